"""The pieces of documents that a sample consists of, as (document, start, stop)."""

from collections.abc import Iterable
from pathlib import Path

from megatron_tf.data.indexed_dataset import IndexedDataset

Extents = Iterable[tuple[int, int, int]]


def prefetch_extents(dataset: IndexedDataset, extents: Extents) -> None:
    """Ask the operating system to read the pieces of a sample ahead, without waiting for them."""
    for extent in extents:
        dataset.prefetch(*extent)


def place_in(dataset: IndexedDataset, extents: Extents, position: int) -> tuple[Path, int, int]:
    """Return the source of the token at `position` of the pieces: (dataset, document, offset in the document).

    Raises IndexError if they have no such token.
    """
    before = 0
    for document, start, stop in extents:
        if 0 <= position - before < stop - start:
            return dataset.prefix, *dataset.place(document, start + position - before)
        before += stop - start
    raise IndexError(f"position {position} is outside the sample's {before} tokens")
