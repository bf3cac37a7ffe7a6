"""Saves a run's checkpoint: every rank writes the rows it holds, and rank 0 completes it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_tf.checkpoint.commit import (
    abandon,
    prepare_directory,
    prune,
    publish,
    step_directory,
    temporary_directory,
)
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.shard_files import PieceSpec, ShardFileWriter, Written, planned_file
from megatron_tf.errors import UserError
from megatron_tf.parallel.sharding import RowShard

T = TypeVar("T")
Tensors = Mapping[str, Sequence[RowShard]]
"""Group of the format ("model", "exp_avg", ...) -> this rank's rows of its tensors."""


@dataclass(frozen=True)
class Retention:
    """Which older checkpoints are kept."""

    keep_last: int | None = None
    """Number of newest checkpoints to keep; None for all."""
    keep_every: int | None = None
    """Also keep checkpoints of steps that are a multiple of this."""


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

    The rows that this rank is responsible for go to files named after `writer_label`. The checkpoint appears once it is
    complete; earlier ones are not touched until then. Raises CheckpointError on every rank if any of them fails.
    """
    is_first = process_group is None or process_group.rank() == 0

    def write() -> Written:
        return write_rank(temporary_directory(root, step), tensors, writer_label)

    def complete() -> None:
        publish(root, step, record=record, written=written)
        if retention.keep_last is not None:
            prune(root, retention.keep_last, retention.keep_every)

    try:
        needed = _gather_on_first(process_group, _on_every_rank(process_group, lambda: _bytes_to_write(tensors)))
        _on_every_rank(process_group, lambda: prepare_directory(root, step, sum(needed)) if is_first else None)
        # on the first rank only: with a thousand ranks, the list of all pieces has a million entries
        written = _gather_on_first(process_group, _on_every_rank(process_group, write))
        _on_every_rank(process_group, lambda: complete() if is_first else None)
    except BaseException:
        if is_first:
            abandon(root, step)
        raise
    return step_directory(root, step)


def write_rank(directory: Path, tensors: Tensors, writer_label: str) -> Written:
    """Write the rows that this rank is responsible for, one file per group."""
    everything = Written({}, [])
    for group, name, mine in _files_to_write(tensors, writer_label):
        with ShardFileWriter(directory / name, [_spec(shard) for shard in mine]) as file:
            for shard in mine:
                file.write(shard.tensor)
        everything.add(file.written(group))
    return everything


def plan_rank(tensors: Tensors, writer_label: str) -> Written:
    """Return what `write_rank` would return, with empty checksums, without writing; tensors need no values."""
    everything = Written({}, [])
    for group, name, mine in _files_to_write(tensors, writer_label):
        everything.add(planned_file(name, [_spec(shard) for shard in mine], group))
    return everything


def _files_to_write(tensors: Tensors, writer_label: str) -> Iterator[tuple[str, str, list[RowShard]]]:
    """Yield the group, the name and the contents of each file of this rank."""
    for group, shards in tensors.items():
        if mine := _to_write(shards):
            yield group, f"{group}-{writer_label}.safetensors", mine


def _bytes_to_write(tensors: Tensors) -> int:
    total = 0
    for shards in tensors.values():
        total += sum(_spec(shard).nbytes for shard in _to_write(shards))
    return total


def _to_write(shards: Sequence[RowShard]) -> list[RowShard]:
    return [shard for shard in shards if shard.is_writer and shard.stop > shard.start]


def _spec(shard: RowShard) -> PieceSpec:
    return PieceSpec(shard.name, shard.tensor.dtype, shard.global_shape, start=shard.start, stop=shard.stop)


def _on_every_rank(process_group: ProcessGroup | None, action: Callable[[], T]) -> T:
    """Run `action` and return this rank's result; if it fails on one rank, all ranks raise that error."""
    result: T | None = None
    message = None
    try:
        result = action()
    except Exception as error:  # any error: a rank that did not report would leave the others waiting
        message = str(error) if isinstance(error, (OSError, UserError)) else repr(error)
    messages: list[str | None] = [message]
    if process_group is not None:
        messages = [None] * process_group.size()
        dist.all_gather_object(messages, message, group=process_group)
    for rank, each in enumerate(messages):
        if each is not None:
            raise CheckpointError(f"saving failed on rank {rank}: {each}")
    return cast(T, result)


def _gather_on_first(process_group: ProcessGroup | None, value: T) -> list[T]:
    """Return the values of all ranks on the first one, and an empty list on the others."""
    if process_group is None:
        return [value]
    values: list[Any] | None = [None] * process_group.size() if process_group.rank() == 0 else None
    dist.gather_object(value, values, group=process_group, group_dst=0)
    return values or []
