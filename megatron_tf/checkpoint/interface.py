"""Interface of checkpoints for reading: our own files, those of other programs, and transformations of either."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_tf.checkpoint.record import RunRecord

BLOCK_BYTES = 4 << 20
"""Rows are streamed in blocks of about this many bytes."""


class Checkpoint(Protocol):
    """Provides any rows of any logical tensor, however they are stored or computed."""

    directory: Path
    record: RunRecord

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""

    def names(self, group: str) -> list[str]:
        """Names of the logical tensors of a group; empty if the checkpoint does not have the group."""

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Global shape of a tensor."""

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Dtype of a tensor."""

    def read_rows(self, group: str, name: str, *, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor to the CPU, and nothing else. Raises CheckpointError if it has fewer."""


def read_blocks(
    checkpoint: Checkpoint, group: str, name: str, *, start: int = 0, stop: int | None = None
) -> Iterator[Tensor]:
    """Yield rows [start, stop) of a tensor, by default all, in blocks of about BLOCK_BYTES and at least one row."""
    shape = checkpoint.shape(group, name)
    step = rows_per_block(shape, checkpoint.dtype(group, name))
    last = shape[0] if stop is None else stop
    for low in range(start, last, step):
        yield checkpoint.read_rows(group, name, start=low, stop=min(last, low + step))


def rows_per_block(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return how many rows of a tensor fit into a block of BLOCK_BYTES, at least one."""
    return max(1, BLOCK_BYTES // max(1, torch.Size(shape[1:]).numel() * dtype.itemsize))
