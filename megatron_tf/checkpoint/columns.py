"""How the columns of a wider tensor follow from the old ones.

Every operation is elementwise, so that the bits of a row do not depend on the block that it is computed in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class RandomRows(Protocol):
    """Random numbers that are a function of the row, such as `Normal`."""

    def rows(self, low: int, high: int, columns: int) -> Tensor:
        """Draw rows [low, high): [high - low, columns]."""


class ColumnMap(Protocol):
    """Makes new columns of old ones."""

    def fill(self, out: Tensor, rows: Tensor) -> None:
        """Fill `out` [R, new columns] from the same `rows` [R, old columns]."""


class ColumnNoise(Protocol):
    """Noise that does not change the product of a row with a widened input."""

    def add_to(self, out: Tensor, *, low: int, high: int) -> None:
        """Add the noise of a segment's rows [low, high) to `out` [high - low, columns]."""


@dataclass(frozen=True)
class Repeated:
    """The old columns, repeated from the first on."""

    is_divided: bool = False
    """Whether each column is divided by its number of copies."""

    def fill(self, out: Tensor, rows: Tensor) -> None:
        """Repeat the columns until `out` is full."""
        old = rows.shape[1]
        for start in range(0, out.shape[1], old):
            copy = out[:, start : start + old]
            copy.copy_(rows[:, : copy.shape[1]])
        if self.is_divided:
            out.div_(_copies(old, out.shape[1]))


def _copies(old: int, new: int) -> Tensor:
    """Return how many copies each column has if `old` columns are repeated up to `new`."""
    return torch.bincount(torch.arange(new) % old)[torch.arange(new) % old]


@dataclass(frozen=True)
class Mixed:
    """Each block of columns times the transpose of `matrix` [columns of a new block, columns of an old one]."""

    matrix: Sequence[Sequence[float]]

    def fill(self, out: Tensor, rows: Tensor) -> None:
        """Multiply each block of `rows` by the matrix."""
        old = rows.unflatten(1, (-1, len(self.matrix[0])))
        new = out.unflatten(1, (-1, len(self.matrix)))
        for place, factors in enumerate(self.matrix):
            column = new[:, :, place].zero_()
            for source, factor in enumerate(factors):
                column.add_(old[:, :, source] * factor)


@dataclass(frozen=True)
class RingNoise:
    """Noise for `Repeated` columns that sums to zero over the copies of a column.

    Each copy gets a random number and loses that of the next one around a ring, so that all copies differ.
    """

    normal: RandomRows
    old: int
    """Number of columns before they were repeated."""

    def add_to(self, out: Tensor, *, low: int, high: int) -> None:
        """Add the noise of rows [low, high)."""
        width = out.shape[1]
        noise = self.normal.rows(low, high, width).to(out.dtype)
        following = torch.arange(width) + self.old
        following = torch.where(following < width, following, following % self.old)
        out.add_(noise - noise[:, following])


@dataclass(frozen=True)
class DirectionalNoise:
    """Noise for `Mixed` columns along one direction of each block, which is orthogonal to the columns of the matrix.

    Its root mean square over a block is the standard deviation of `normal`.
    """

    normal: RandomRows
    direction: Sequence[float]

    def add_to(self, out: Tensor, *, low: int, high: int) -> None:
        """Add the noise of rows [low, high)."""
        size = len(self.direction)
        noise = self.normal.rows(low, high, out.shape[1] // size).to(out.dtype)
        scale = math.sqrt(size) / math.hypot(*self.direction)
        blocks = out.unflatten(1, (-1, size))
        for place, part in enumerate(self.direction):
            blocks[:, :, place].add_(noise * (part * scale))
