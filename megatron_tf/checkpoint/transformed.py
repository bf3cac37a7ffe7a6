"""A checkpoint that transforms another one without being written: each tensor is old rows, new rows and zeros.

A command writes it to files; a run that grows reads it straight into its new, larger model: so both give the same rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.tokenformer.initial_values import normal_rows


@dataclass(frozen=True)
class Copy:
    """Rows [start, stop) of a tensor of the source, times `scale`; values of copies also get noise."""

    name: str
    start: int
    stop: int
    scale: float = 1.0
    noise: Sequence["Normal"] = ()
    """Added and, the second one, taken away: so it adds up to zero over a ring of copies."""

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the segment's rows [low, high)."""
        out.copy_(source.read_rows(group, self.name, start=self.start + low, stop=self.start + high))
        if self.scale != 1.0:  # otherwise every bit stays
            out.mul_(self.scale)
        for normal, sign in zip(self.noise, (1, -1), strict=False):
            out.add_(normal.rows(low, high, out.shape[1]), alpha=sign)


@dataclass(frozen=True)
class Normal:
    """Rows [start, stop) of the random tensor `stream`, each a function of stream, seed and its number alone: any rank
    makes its own, in blocks of any size."""

    stream: str
    seed: int
    start: int
    stop: int
    std: float

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, low: int, high: int, columns: int) -> Tensor:
        """The segment's rows [low, high)."""
        start, stop = self.start + low, self.start + high
        return normal_rows(self.stream, seed=self.seed, start=start, stop=stop, columns=columns, std=self.std)

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the segment's rows [low, high)."""
        out.copy_(self.rows(low, high, out.shape[1]))


@dataclass(frozen=True)
class Zeros:
    """Rows of zeros."""

    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with zeros."""
        out.zero_()


Segment = Copy | Normal | Zeros


@dataclass(frozen=True)
class Recipe:
    """How a tensor is made: its type, the shape of a row, its segments in row order."""

    dtype: torch.dtype
    columns: tuple[int, ...]
    segments: Sequence[Segment]

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return (sum(map(len, self.segments)), *self.columns)


class TransformedCheckpoint:
    """`recipes` over the tensors of `source`: group -> name -> Recipe, in the order of the new model."""

    def __init__(self, source: Checkpoint, recipes: Mapping[str, Mapping[str, Recipe]], record: RunRecord) -> None:
        self.source = source
        self.directory = source.directory
        self.record = record
        self.recipes = recipes

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return list(self.recipes)

    def names(self, group: str) -> list[str]:
        """Logical tensors of a group."""
        return list(self.recipes.get(group, {}))

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Global shape."""
        return self._recipe(group, name).shape

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Type."""
        return self._recipe(group, name).dtype

    def read_rows(self, group: str, name: str, *, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor. Raises CheckpointError if it has fewer."""
        recipe = self._recipe(group, name)
        if not 0 <= start <= stop <= recipe.shape[0]:
            raise CheckpointError(f"{name} has {recipe.shape[0]} rows, [{start}, {stop}) are requested")
        # each segment fills its part of the rows that are read, so that no segment has to be whole in memory
        rows = torch.empty((stop - start, *recipe.columns), dtype=recipe.dtype)
        first = 0  # row of the tensor with which the segment begins
        for segment in recipe.segments:
            low, high = max(start, first), min(stop, first + len(segment))
            if low < high:
                out = rows[low - start : high - start]
                segment.read(self.source, group, low=low - first, high=high - first, out=out)
            first += len(segment)
        return rows

    def _recipe(self, group: str, name: str) -> Recipe:
        try:
            return self.recipes[group][name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name!r} in {group!r}") from None


def copied(source: Checkpoint, group: str, name: str) -> Recipe:
    """The whole tensor as it is."""
    rows, *columns = source.shape(group, name)
    return Recipe(source.dtype(group, name), tuple(columns), [Copy(name, 0, rows)])
