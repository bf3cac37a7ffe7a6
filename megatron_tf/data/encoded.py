"""Ids of texts, end to end, without a Python object for each."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Encoded(NamedTuple):
    """Ids of several texts, end to end."""

    ids: NDArray[np.integer]
    lengths: NDArray[np.int64]
    """Ids of each text."""

    def rows(self) -> list[NDArray[np.integer]]:
        """The ids of each text."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])

    def chosen(self, which: Sequence[int]) -> "Encoded":
        """Only the texts `which`."""
        rows = self.rows()
        return Encoded(np.concatenate([rows[i] for i in which]), self.lengths[list(which)])

    def replaced(self, which: Sequence[int], others: "Encoded") -> "Encoded":
        """With the texts `which` encoded as in `others`."""
        rows = self.rows()
        lengths = self.lengths.copy()
        for i, row in zip(which, others.rows(), strict=True):
            rows[i] = row
            lengths[i] = len(row)
        return Encoded(np.concatenate(rows), lengths)


def end_to_end(rows: list[list[int]]) -> Encoded:
    """The ids of texts, one list each, as Encoded."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = chain.from_iterable(rows)
    return Encoded(np.fromiter(flat, dtype=np.int32, count=int(lengths.sum())), lengths)
