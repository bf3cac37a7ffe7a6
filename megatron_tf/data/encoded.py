"""Concatenated ids of several texts as arrays, without a Python object per id."""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Encoded(NamedTuple):
    """Ids of several texts, concatenated."""

    ids: NDArray[np.integer]
    lengths: NDArray[np.int64]
    """Number of ids of each text."""

    def rows(self) -> list[NDArray[np.integer]]:
        """Return the ids of each text as a view."""
        ends = np.cumsum(self.lengths).tolist()
        return [self.ids[start:end] for start, end in pairwise([0, *ends])]

    def chosen(self, which: Sequence[int]) -> "Encoded":
        """Select the texts with the indices `which`."""
        rows = self.rows()
        return joined([rows[i] for i in which])

    def replaced(self, which: Sequence[int], others: "Encoded") -> "Encoded":
        """Return a copy in which the texts with the indices `which` are replaced by those of `others`."""
        rows = self.rows()
        for i, row in zip(which, others.rows(), strict=True):
            rows[i] = row
        return joined(rows)

    def finished(self, dtype: np.dtype, end: int | None) -> "Encoded":
        """Return the ids in another type, which must hold them, and with the id `end` after each text.

        An empty text stays empty, as in Megatron-LM's preprocessing.
        """
        if end is None:
            return Encoded(self.ids.astype(dtype), self.lengths)
        last = np.array([end], dtype)
        pieces = [piece for row in self.rows() if len(row) for piece in (row, last)]
        # one pass inserts and converts
        ids = np.concatenate([last[:0], *pieces], dtype=dtype, casting="unsafe")
        return Encoded(ids, self.lengths + (self.lengths > 0))


def joined(rows: Sequence[NDArray[np.integer]]) -> Encoded:
    """Concatenate the ids of several texts."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Encoded(np.concatenate(rows) if rows else np.empty(0, np.int32), lengths)


def end_to_end(rows: list[list[int]]) -> Encoded:
    """Concatenate lists of ids, one per text."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = chain.from_iterable(rows)
    return Encoded(np.fromiter(flat, dtype=np.uint32, count=int(lengths.sum())), lengths)
