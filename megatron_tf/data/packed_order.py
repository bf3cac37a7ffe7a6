"""The order of samples under `data.packing: best_fit`: rows of whole documents."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data._index import sample_index
from megatron_tf.data.best_fit import Packing, best_fit
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.order import EpochOrder
from megatron_tf.data.order_cache import OrderArrays

PACKING_VERSION = 1


@dataclass(frozen=True)
class PackingReport:
    """What packing does to an epoch of a dataset."""

    name: str
    seq_length: int
    documents: int
    tokens: int
    rows: int
    cut: int
    """Number of documents that are longer than a row, and hence cut."""
    cut_by_concatenation: int
    """Number of documents that `data.packing: concatenate` would cut in the first epoch."""

    def __str__(self) -> str:
        places = self.rows * self.seq_length
        return (
            f"{self.name}: {self.documents:,} documents in {self.rows:,} rows of {self.seq_length:,} tokens, "
            f"{(places - self.tokens) / places:.2%} padding ({places - self.tokens:,}), no token dropped; "
            f"{self.cut:,} documents cut, as they are longer than a row (concatenate: {self.cut_by_concatenation:,})"
        )


class PackedOrder(EpochOrder):
    """The order of rows of up to `seq_length` tokens, into which documents are packed whole, by best-fit decreasing.

    Only documents longer than a row are cut: into full rows, and a rest that is packed like a document. Which documents
    share a row is drawn again for each epoch, as are their order within it and the order of the rows. How many rows
    there are does not depend on that. Raises DataError if there is no token.
    """

    def __init__(self, lengths: NDArray[np.integer], *, seq_length: int, seed: int, name: str, cache: Path) -> None:
        key = ("packing", PACKING_VERSION)
        super().__init__(lengths, seq_length=seq_length, seed=seed, name=name, cache=cache, key=key)

    def report(self) -> PackingReport:
        """Return the counts of an epoch."""
        documents = self._permutation(len(self.lengths), 0, "documents")
        position, offset = sample_index(documents, self.lengths, self.seq_length)
        return PackingReport(
            self.name,
            self.seq_length,
            documents=int(np.count_nonzero(self.lengths)),
            tokens=int(self.lengths.sum(dtype=np.int64)),
            rows=self.samples_per_epoch,
            cut=int(np.count_nonzero(self.lengths > self.seq_length)),
            cut_by_concatenation=int(np.count_nonzero(np.diff(position[offset > 0].astype(np.int64), prepend=-1))),
        )

    @cached_property
    def _rests(self) -> NDArray[np.integer]:
        """Length of what is left of each document after its full rows."""
        return self.lengths % self.seq_length

    @cached_property
    def _packing(self) -> Packing:
        return best_fit(np.bincount(self._rests, minlength=self.seq_length), self.seq_length)

    def _count(self) -> int:
        full_rows = int((self.lengths // self.seq_length).sum(dtype=np.int64))
        rows = self._packing.num_rows + full_rows
        if rows == 0:
            raise DataError(f"{self.name} has no tokens: give more data, or another split")
        return rows

    def _build(self, epoch: int) -> OrderArrays:
        documents, offsets, rows = self._pieces(self._permutation(len(self.lengths), epoch, "documents"))
        mixed = self._permutation(len(rows), epoch, "pieces")
        order = mixed[np.argsort(rows[mixed], kind="stable")]
        position = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=self.samples_per_epoch))))
        shuffle = self._permutation(self.samples_per_epoch, epoch, "samples")
        return OrderArrays(
            documents=_narrow(documents[order]),
            position=_narrow(position),
            offset=_narrow(offsets[order]),
            shuffle=shuffle,
        )

    def _pieces(self, order: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return (document, offset, row) of each piece, for documents in a random order that breaks ties of size."""
        rests = self._rests[order]
        largest_first = order[np.argsort(-rests.astype(np.int64), kind="stable")][: np.count_nonzero(rests)]
        # full rows come after the packed ones; they are those of long documents, in turn
        full_rows = (self.lengths // self.seq_length).astype(np.int64)
        of = np.repeat(np.arange(len(self.lengths)), full_rows)
        place = np.arange(len(of)) - np.repeat(np.cumsum(full_rows) - full_rows, full_rows)
        return (
            np.concatenate((largest_first, of), dtype=np.int64),
            np.concatenate((full_rows[largest_first], place)) * self.seq_length,
            np.concatenate((self._packing.row, self._packing.num_rows + np.arange(len(of)))),
        )


def _narrow(values: NDArray[np.int64]) -> NDArray[np.integer]:
    """Return 32-bit integers if they are enough."""
    return values.astype(np.uint32) if not len(values) or int(values.max()) < 2**32 else values
