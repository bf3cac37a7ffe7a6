"""A set under `data.order: lanes`: its documents as a ring of tokens that is shuffled again for each epoch."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_tf.data._index import permutation
from megatron_tf.data.extents import place_in, prefetch_extents
from megatron_tf.data.indexed_dataset import IndexedDataset
from megatron_tf.data.lanes import Span
from megatron_tf.data.loss_mask import counted
from megatron_tf.data.order import aligned
from megatron_tf.data.phases import Reading, Ring
from megatron_tf.data.sample import Sample, lengths_of_inputs

_LANES_VERSION = 1


class RingArrays(NamedTuple):
    """The documents of an epoch in their order, and the tokens up to the end of each; both are [documents]."""

    documents: NDArray[np.integer]
    ends: NDArray[np.integer]


class LaneSet:
    """The tokens of a range of documents, addressed by epoch and by place in the epoch's ring.

    Holds the order of one epoch in memory, 12 to 16 bytes for each document.
    """

    def __init__(
        self, dataset: IndexedDataset, documents: range, *, seed: int, mask: IndexedDataset | None = None
    ) -> None:
        self.dataset = dataset
        self.mask = mask
        self.documents = documents
        self._lengths = aligned(dataset.document_lengths[documents.start : documents.stop])
        content = xxhash.xxh3_128_hexdigest(self._lengths.data)
        self._identity = (_LANES_VERSION, content, seed, dataset.prefix.name, documents.start)
        key = xxhash.xxh3_128_hexdigest(repr(self._identity).encode())
        self.ring = Ring(int(self._lengths.sum(dtype=np.int64)), key)
        self._epoch: tuple[int, RingArrays] | None = None

    def ids(self, reading: Reading) -> NDArray[np.integer]:
        """Return the ids of a sample, [seq_length + 1]: the token before its first target, then its targets."""
        pieces = [self.dataset.document(*extent) for extent in self.extents(reading)]
        return np.concatenate(pieces)

    def read(self, reading: Reading) -> Sample:
        """Return a sample, with its loss mask and the lengths of its conversations if it is chat data."""
        if self.mask is None:
            return Sample(self.ids(reading))
        extents = list(self.extents(reading))
        return Sample(self.ids(reading), counted(self.mask, extents), lengths_of_inputs(extents))

    def prefetch(self, reading: Reading) -> None:
        """Ask the operating system to read a sample ahead, without waiting for it."""
        prefetch_extents(self.dataset, self.extents(reading))

    def place(self, reading: Reading, position: int) -> tuple[Path, int, int]:
        """Return the source of the token at `position` of a sample: (dataset, document, offset in the document)."""
        return place_in(self.dataset, self.extents(reading), position)

    def extents(self, reading: Reading) -> Iterator[tuple[int, int, int]]:
        """Yield (document, start, stop) of each piece of a sample of [seq_length + 1] tokens."""
        arrays = self._arrays_of(reading.epoch)
        for start, stop in _with_first_input(reading.spans, self.ring.tokens):
            yield from self._pieces(arrays, start, stop)

    def _pieces(self, arrays: RingArrays, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        # the first document that ends after the start; empty ones end where they begin, and are skipped
        number = int(np.searchsorted(arrays.ends, start, side="right"))
        while start < stop:
            document, end = int(arrays.documents[number]), int(arrays.ends[number])
            begin = end - int(self._lengths[document])
            last = min(stop, end)
            if last > start:
                yield self.documents.start + document, start - begin, last - begin
            start = max(start, last)
            number += 1

    def _arrays_of(self, epoch: int) -> RingArrays:
        # consecutive samples share an epoch; another thread may replace it
        latest = self._epoch
        if latest is None or latest[0] != epoch:
            self._epoch = latest = epoch, self._build(epoch)
        return latest[1]

    def _build(self, epoch: int) -> RingArrays:
        digest = hashlib.blake2b(repr((*self._identity, epoch)).encode(), digest_size=16).digest()
        documents = permutation(
            len(self._lengths), int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        )
        return RingArrays(documents, np.cumsum(self._lengths[documents], dtype=np.int64))


def _with_first_input(spans: Iterable[Span], tokens: int) -> Iterator[Span]:
    """Yield the spans of a sample's targets, with the token before the first one; the ring's is its last token."""
    first, *others = spans
    start, stop = first
    if start:
        yield start - 1, stop
    else:
        yield tokens - 1, tokens
        yield start, stop
    yield from others
