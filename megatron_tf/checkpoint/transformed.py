"""A checkpoint made from another without being written: each tensor is a sequence of old rows, new rows and zeros.

The tool writes it to files; a run that grows reads it straight into its new, larger model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.tokenformer.initial_values import normal_rows

BLOCK_BYTES = 4 << 20
"""Rows are streamed in blocks of about this many bytes."""


class Checkpoint(Protocol):
    """Any rows of any logical tensor: of files, or derived from such."""

    directory: Path
    record: RunRecord

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""

    def names(self, group: str) -> list[str]:
        """Logical tensors of a group; none for a group it does not have."""

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Global shape."""

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Type."""

    def read_rows(self, group: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, on the CPU; only those are read. Raises CheckpointError if it has fewer."""


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

    def read(self, source: Checkpoint, group: str, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the segment's rows [low, high)."""
        out.copy_(source.read_rows(group, self.name, self.start + low, self.start + high))
        if self.scale != 1.0:
            out.mul_(self.scale)
        for normal, sign in zip(self.noise, (1, -1), strict=False):
            out.add_(normal.rows(low, high, out.shape[1]), alpha=sign)


@dataclass(frozen=True)
class Normal:
    """Rows [start, stop) of the random tensor `stream`."""

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

    def read(self, source: Checkpoint, group: str, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the segment's rows [low, high)."""
        out.copy_(self.rows(low, high, out.shape[1]))


@dataclass(frozen=True)
class Zeros:
    """Rows of zeros."""

    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, source: Checkpoint, group: str, low: int, high: int, out: Tensor) -> None:
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


class DerivedCheckpoint:
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

    def read_rows(self, group: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor. Raises CheckpointError if it has fewer."""
        recipe = self._recipe(group, name)
        if not 0 <= start <= stop <= recipe.shape[0]:
            raise CheckpointError(f"{name} has {recipe.shape[0]} rows, [{start}, {stop}) are asked for")
        rows = torch.empty((stop - start, *recipe.columns), dtype=recipe.dtype)
        first = 0
        for segment in recipe.segments:
            low, high = max(start, first), min(stop, first + len(segment))
            if low < high:
                segment.read(self.source, group, low - first, high - first, rows[low - start : high - start])
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


def rows_per_block(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Rows of a tensor that make a block of BLOCK_BYTES, at least one."""
    return max(1, BLOCK_BYTES // max(1, torch.Size(shape[1:]).numel() * dtype.itemsize))


def read_blocks(checkpoint: Checkpoint, group: str, name: str, start: int, stop: int) -> Iterator[Tensor]:
    """Rows [start, stop) of a tensor in blocks of bounded size."""
    step = rows_per_block(checkpoint.shape(group, name), checkpoint.dtype(group, name))
    for low in range(start, stop, step):
        yield checkpoint.read_rows(group, name, low, min(stop, low + step))
