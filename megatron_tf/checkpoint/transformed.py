"""Virtual checkpoints that transform another one: each tensor is assembled from old rows, new rows and zeros.

A command writes them to files; a run that grows reads them directly into its larger model, so both get the same rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.checkpoint.columns import ColumnMap, ColumnNoise
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint, rows_per_block
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.rotation import blocks, rotated
from megatron_tf.tokenformer.initial_values import normal_rows


@dataclass(frozen=True)
class Copy:
    """Rows [start, stop) of a tensor of the source, multiplied by `scale`, plus noise."""

    name: str
    start: int
    stop: int
    scale: float = 1.0
    noise: Sequence["Normal"] = ()
    """Noise to add and noise to subtract, arranged so that it sums to zero over a ring of copies."""
    columns: ColumnMap | None = None
    """How the new columns follow from the old ones; None keeps them."""
    column_noise: ColumnNoise | None = None
    """Noise within each row."""

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_plain(self) -> bool:
        """Return whether the rows are those of the source, unchanged."""
        return self.scale == 1.0 and not self.noise and self.columns is None and self.column_noise is None

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the segment's rows [low, high)."""
        rows = source.read_rows(group, self.name, start=self.start + low, stop=self.start + high)
        if self.columns is None:
            out.copy_(rows)
        else:
            self.columns.fill(out, rows)
        if self.scale != 1.0:  # skipped otherwise, so that every bit is preserved
            out.mul_(self.scale)
        for normal, sign in zip(self.noise, (1, -1), strict=False):
            out.add_(normal.rows(low, high, out.shape[1]), alpha=sign)
        if self.column_noise is not None:
            self.column_noise.add_to(out, low=low, high=high)


@dataclass(frozen=True)
class MappedVector:
    """A vector of the source whose entries are mapped as the columns of a row are."""

    name: str
    count: int
    columns: ColumnMap

    def __len__(self) -> int:
        return self.count

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the entries [low, high)."""
        (old,) = source.shape(group, self.name)
        row = source.read_rows(group, self.name, start=0, stop=old)[None]
        whole = row.new_empty(1, self.count)
        self.columns.fill(whole, row)
        out.copy_(whole[0, low:high])


@dataclass(frozen=True)
class Merged:
    """The sum of all copies of each row and of each column, times `scale`; undoes copying.

    The copies of rows [0, count) are the next `count` rows, and those of columns likewise.
    """

    name: str
    count: int
    row_copies: int
    column_copies: int
    scale: float

    def __len__(self) -> int:
        return self.count

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the segment's rows [low, high)."""
        total = torch.zeros(out.shape, dtype=torch.float64)  # in fp32, a sum of equal copies would be rounded
        for first in range(0, self.row_copies * self.count, self.count):
            rows = source.read_rows(group, self.name, start=first + low, stop=first + high)
            for copy in rows.chunk(self.column_copies, dim=-1) if self.column_copies > 1 else [rows]:
                total.add_(copy)
        out.copy_(total.mul_(self.scale))


@dataclass(frozen=True)
class Normal:
    """Rows [start, stop) of the random tensor `stream`. Each row only depends on the stream, the seed and its index, so
    that any rank can generate its own rows in blocks of any size."""

    stream: str
    seed: int
    start: int
    stop: int
    std: float

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, low: int, high: int, columns: int) -> Tensor:
        """Generate rows [low, high) of the segment."""
        start, stop = self.start + low, self.start + high
        return normal_rows(self.stream, seed=self.seed, start=start, stop=stop, columns=columns, std=self.std)

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the segment's rows [low, high)."""
        out.copy_(self.rows(low, high, out.shape[1]))


@dataclass(frozen=True, eq=False)
class SelectedRows:
    """Some rows of a tensor of the source, each multiplied by its own factor, plus noise."""

    name: str
    rows: Tensor
    """Their indices in increasing order, int64 [count]."""
    scales: Tensor
    """The factor of each, float64 [count]."""
    noise: Sequence[Normal] = ()
    """As in `Copy`, but with a row for each row of the whole tensor; rows with a factor of 1 get none."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the segment's rows [low, high)."""
        most = rows_per_block(source.shape(group, self.name), out.dtype)
        while low < high:
            # rows that are far apart are read in several blocks, so that not all rows between them are in memory
            beyond = int(torch.searchsorted(self.rows, int(self.rows[low]) + most))
            stop = min(high, beyond)
            out[: stop - low] = self._read_block(source, group, slice(low, stop))
            low, out = stop, out[stop - low :]

    def _read_block(self, source: Checkpoint, group: str, part: slice) -> Tensor:
        rows, scales = self.rows[part], self.scales[part]
        first, last = int(rows[0]), int(rows[-1]) + 1
        block = source.read_rows(group, self.name, start=first, stop=last)[rows - first]
        block.mul_(scales[:, None].to(block.dtype))
        noisy = scales != 1
        for normal, sign in zip(self.noise, (1, -1), strict=False):
            drawn = normal.rows(first, last, block.shape[1])[rows - first]
            block[noisy] = block[noisy].add_(drawn[noisy], alpha=sign)
        return block


@dataclass(frozen=True)
class Rotated:
    """All rows of a tensor of the source, times an orthogonal matrix."""

    name: str
    count: int
    stream: str
    seed: int

    def __len__(self) -> int:
        return self.count

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the segment's rows [low, high)."""
        for block in blocks(self.count):
            first, last = max(low, block.start), min(high, block.stop)
            if first < last:
                rows = self._block(source, group, block)
                out[first - low : last - low] = rows[first - block.start : last - block.start]

    def _block(self, source: Checkpoint, group: str, block: range) -> Tensor:
        start, stop = block.start, block.stop
        drawn = normal_rows(self.stream, seed=self.seed, start=start, stop=stop, columns=1, std=1.0)
        signs = torch.where(drawn[:, 0] < 0, -1.0, 1.0)
        return rotated(source.read_rows(group, self.name, start=start, stop=stop), signs)


@dataclass(frozen=True)
class Constant:
    """Rows of one number."""

    value: float
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with the number."""
        out.fill_(self.value)


@dataclass(frozen=True)
class Zeros:
    """Rows of zeros."""

    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, source: Checkpoint, group: str, *, low: int, high: int, out: Tensor) -> None:
        """Fill `out` with zeros."""
        out.zero_()


Segment = Copy | MappedVector | Merged | SelectedRows | Normal | Rotated | Constant | Zeros


@dataclass(frozen=True)
class Recipe:
    """How to assemble a tensor: its type, the shape of a row, and its segments in row order."""

    dtype: torch.dtype
    columns: tuple[int, ...]
    segments: Sequence[Segment]

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape of the tensor."""
        return (sum(map(len, self.segments)), *self.columns)

    @property
    def plain_copy(self) -> Copy | None:
        """Return the segment if the tensor is nothing but unchanged rows of the source."""
        if len(self.segments) != 1:
            return None
        (only,) = self.segments
        return only if isinstance(only, Copy) and only.is_plain else None


class TransformedCheckpoint:
    """A checkpoint given by `recipes` (group -> name -> Recipe, in the new model's order) for tensors of `source`."""

    def __init__(self, source: Checkpoint, recipes: Mapping[str, Mapping[str, Recipe]], record: RunRecord) -> None:
        self.source = source
        self.directory = source.directory
        self.record = record
        self.recipes = recipes

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return list(self.recipes)

    def names(self, group: str) -> list[str]:
        """Names of the logical tensors of a group."""
        return list(self.recipes.get(group, {}))

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Global shape."""
        return self._recipe(group, name).shape

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._recipe(group, name).dtype

    def read_rows(self, group: str, name: str, *, start: int, stop: int) -> Tensor:
        """Assemble rows [start, stop) of a tensor. Raises CheckpointError if it has fewer."""
        recipe = self._recipe(group, name)
        if not 0 <= start <= stop <= recipe.shape[0]:
            raise CheckpointError(f"{name} has {recipe.shape[0]} rows, [{start}, {stop}) are requested")
        if (copy := recipe.plain_copy) is not None:
            return self.source.read_rows(group, copy.name, start=copy.start + start, stop=copy.start + stop)
        # each segment only fills the requested rows, so that no complete segment has to fit in memory
        rows = torch.empty((stop - start, *recipe.columns), dtype=recipe.dtype)
        first = 0  # first row of the segment within the tensor
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
    """Return the recipe that copies a whole tensor unchanged."""
    rows, *columns = source.shape(group, name)
    return Recipe(source.dtype(group, name), tuple(columns), [Copy(name, 0, rows)])
