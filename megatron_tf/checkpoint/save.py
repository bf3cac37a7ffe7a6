"""Saving a run's checkpoint: every rank writes the rows it holds, rank 0 completes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_tf.checkpoint.commit import abandon, prepare_directory, prune, publish, temporary_directory
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.shard_files import PieceSpec, ShardFileWriter, Written
from megatron_tf.errors import UserError
from megatron_tf.parallel.sharding import RowShard

T = TypeVar("T")
Tensors = Mapping[str, Sequence[RowShard]]
"""Group of the format ("model", "exp_avg", ...) -> the rows that this rank holds of its tensors."""


@dataclass(frozen=True)
class Retention:
    """Which older checkpoints stay."""

    keep_last: int | None = None
    """Number of the newest; None for all."""
    keep_every: int | None = None
    """And those of steps that are a multiple of this."""


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Tensors,
    record: RunRecord,
    writer_label: str,
    process_group: ProcessGroup | None = None,
    retention: Retention = Retention(),
) -> Path:
    """Write the checkpoint of `step` under `root` and return its directory; every rank of `process_group` calls it.

    The rows that this rank is the writer of go to files named by `writer_label`. The checkpoint appears when it is
    complete, and the ones before are left as they are until then. Raises CheckpointError on every rank where any of
    them fails.
    """
    is_first = process_group is None or process_group.rank() == 0

    def write() -> Written:
        return write_rank(temporary_directory(root, step), tensors, writer_label)

    def complete() -> Path:
        path = publish(root, step, record=record, written=written)
        if retention.keep_last is not None:
            prune(root, retention.keep_last, retention.keep_every)
        return path

    try:
        needed = sum(_on_every_rank(process_group, lambda: _bytes_to_write(tensors)))
        _on_every_rank(process_group, lambda: prepare_directory(root, step, needed) if is_first else None)
        written = _on_every_rank(process_group, write)
        paths = _on_every_rank(process_group, lambda: complete() if is_first else None)
    except BaseException:
        if is_first:
            abandon(root, step)
        raise
    path = paths[0]
    assert path is not None
    return path


def write_rank(directory: Path, tensors: Tensors, writer_label: str) -> Written:
    """Write the rows that this rank is the writer of, a file for each group."""
    everything = Written({}, [])
    for group, shards in tensors.items():
        if mine := _to_write(shards):
            path = directory / f"{group}-{writer_label}.safetensors"
            with ShardFileWriter(path, [_spec(shard) for shard in mine]) as file:
                for shard in mine:
                    file.write(shard.tensor)
            written = file.written(group)
            everything.files.update(written.files)
            everything.pieces.extend(written.pieces)
    return everything


def _bytes_to_write(tensors: Tensors) -> int:
    total = 0
    for shards in tensors.values():
        total += sum(_spec(shard).nbytes for shard in _to_write(shards))
    return total


def _to_write(shards: Sequence[RowShard]) -> list[RowShard]:
    return [shard for shard in shards if shard.is_writer and shard.stop > shard.start]


def _spec(shard: RowShard) -> PieceSpec:
    return PieceSpec(shard.name, shard.tensor.dtype, shard.global_shape, start=shard.start, stop=shard.stop)


def _on_every_rank(process_group: ProcessGroup | None, action: Callable[[], T]) -> list[T]:
    """Results of `action` in rank order; where it fails on one rank, all raise that rank's error."""
    outcome: tuple[T | None, str | None]
    try:
        outcome = action(), None
    except Exception as error:  # whatever it is: a rank that stayed away would leave the others waiting
        outcome = None, str(error) if isinstance(error, (OSError, UserError)) else repr(error)
    outcomes: list[Any] = [outcome]
    if process_group is not None:
        outcomes = [None] * process_group.size()
        dist.all_gather_object(outcomes, outcome, group=process_group)
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise CheckpointError(f"saving failed on rank {rank}: {message}")
    return [result for result, _ in outcomes]
