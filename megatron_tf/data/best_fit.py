"""Best-fit decreasing packing of whole documents into rows (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830)."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class _Group(NamedTuple):
    """Consecutive rows that have the same free space."""

    first: int
    rows: int


class Packing(NamedTuple):
    """Where items go that are sorted by size, the largest first."""

    num_rows: int
    row: NDArray[np.int64]
    """Row of each item, [items]."""


def best_fit(counts: NDArray[np.integer], capacity: int) -> Packing:
    """Pack items into rows of `capacity`: each, from the largest on, into the fullest row that has room for it.

    `counts[s]` is the number of items of size s, for sizes 0 to `capacity`; those of size 0 are left out. Items of one
    size are interchangeable, and so are rows with the same free space: each step places many items at once, and the
    number of steps depends on `capacity`, not on the number of items.
    """
    rows = _Rows(capacity)
    steps = []
    for size in np.flatnonzero(counts[1:])[::-1] + 1:
        steps += rows.place(int(size), int(counts[size]))
    return Packing(rows.count, _rows_of_items(steps))


class _Step(NamedTuple):
    """Items of one size placed into consecutive rows, `per_row` into each."""

    first_row: int
    rows: int
    per_row: int


class _Rows:
    """The rows so far, by their free space."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._groups: dict[int, list[_Group]] = {}
        self._spaces: list[int] = []  # keys of _groups, ascending

    def place(self, size: int, items: int) -> list[_Step]:
        """Place items of one size, which is at most that of all before."""
        steps = []
        while items:
            space, group = self._take(size, items)
            # the row just used stays the fullest one with room, so it takes items until it has none
            per_row = min(space // size, items)
            used = _Group(group.first, min(group.rows, items // per_row))
            self._add(space, _Group(used.first + used.rows, group.rows - used.rows))
            self._add(space - per_row * size, used)
            steps.append(_Step(used.first, used.rows, per_row))
            items -= used.rows * per_row
        return steps

    def _take(self, size: int, items: int) -> tuple[int, _Group]:
        """Remove and return (free space, group) of the fullest rows with room for `size`, or of new rows."""
        at = bisect_left(self._spaces, size)
        if at == len(self._spaces):
            rows = -(-items // (self.capacity // size))
            self.count += rows
            return self.capacity, _Group(self.count - rows, rows)
        space = self._spaces[at]
        group = self._groups[space].pop()
        if not self._groups[space]:
            del self._groups[space], self._spaces[at]
        return space, group

    def _add(self, space: int, group: _Group) -> None:
        if not group.rows or not space:
            return
        if space not in self._groups:
            self._groups[space] = []
            insort(self._spaces, space)
        self._groups[space].append(group)


def _rows_of_items(steps: list[_Step]) -> NDArray[np.int64]:
    """Return the row of each item, in the order in which the steps place them."""
    first, rows, per_row = np.array(steps, dtype=np.int64).reshape(-1, 3).T
    items = rows * per_row
    place = np.arange(items.sum()) - np.repeat(np.cumsum(items) - items, items)
    return np.repeat(first, items) + place // np.repeat(per_row, items)
