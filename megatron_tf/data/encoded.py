"""Concatenated ids of several texts as arrays, without a Python object per id."""

from collections.abc import Sequence
from itertools import chain
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
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])

    def chosen(self, which: Sequence[int]) -> "Encoded":
        """Select the texts with the indices `which`."""
        rows = self.rows()
        return Encoded(np.concatenate([rows[i] for i in which]), self.lengths[list(which)])

    def replaced(self, which: Sequence[int], others: "Encoded") -> "Encoded":
        """Return a copy in which the texts with the indices `which` are replaced by those of `others`."""
        rows = self.rows()
        lengths = self.lengths.copy()
        for i, row in zip(which, others.rows(), strict=True):
            rows[i] = row
            lengths[i] = len(row)
        return Encoded(np.concatenate(rows), lengths)


def end_to_end(rows: list[list[int]]) -> Encoded:
    """Concatenate lists of ids, one per text."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = chain.from_iterable(rows)
    return Encoded(np.fromiter(flat, dtype=np.int32, count=int(lengths.sum())), lengths)
