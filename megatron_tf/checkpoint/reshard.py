"""Resharding: streams any checkpoint, stored or transformed, into files for another layout.

Each rank of the target layout gets one file per group. Tensors are written one after another, with their rows in order,
to all the files that share them. All files are therefore read and written sequentially, once, and hashed on the way.
Memory is bounded by a few blocks of rows, independent of the size of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_tf.ahead import computed_ahead
from megatron_tf.checkpoint.commit import abandon, prepare_directory, publish, step_directory
from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.destination import check_destination, check_outside_checkpoints
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint, read_blocks
from megatron_tf.checkpoint.lock import RunLock
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.shard_files import PieceSpec, ShardFileWriter, Written
from megatron_tf.parallel.sharding import split_rows
from megatron_tf.tokenformer.parameters import Module, Parameter

_BLOCKS_AHEAD = 4  # blocks to read ahead while earlier ones are written
MEMORY_BLOCKS = 64
"""Upper bound on the blocks (or rows, if larger) `reshard` holds in memory: 31 were measured, 51 with growth."""


@dataclass(frozen=True)
class FilePlan:
    """One file of the target layout."""

    group: str
    name: str
    specs: list[PieceSpec]
    """Contents in the order in which they are written."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Target:
    """The parallel layout to write a checkpoint for."""

    tensor_parallel: int
    stages: Sequence[range]
    """Layers of each pipeline stage."""

    def stage_of(self, parameter: Parameter) -> int:
        """Return the pipeline stage that owns a parameter."""
        if parameter.layer is not None:
            return next(stage for stage, layers in enumerate(self.stages) if parameter.layer in layers)
        return 0 if parameter.module is Module.EMBEDDING else len(self.stages) - 1

    def num_parts(self, parameter: Parameter) -> int:
        """Return how many tensor-parallel ranks share a parameter's rows; an unshared one is in the first rank's
        file."""
        return self.tensor_parallel if parameter.is_sharded else 1


def reshard(
    checkpoint: Checkpoint,
    root: Path,
    target: Target,
    *,
    check_source: Callable[[], object] = lambda: None,
    progress: Callable[[int], object] = lambda num_bytes: None,
    allow_existing: bool = False,
) -> Path:
    """Write `checkpoint` for `target` under `root`; returns its directory.

    Parameters, optimizer state, counters, tau and lineage are all included. `progress` is called with the bytes written
    since its last call. `check_source` is called after everything is written and raises if the source is damaged: then,
    as after any error, nothing appears under `root`.

    Raises CheckpointError if rows are not divisible, the disk is too small, `root` is inside a checkpoint, or, without
    `allow_existing`, it contains other checkpoints; LockedError if a run is writing to `root`.
    """
    RunRecord.from_json(checkpoint.record.to_json(), checkpoint.directory)  # what is written can be read
    step = checkpoint.record.training.step
    if step_directory(root, step).resolve() == checkpoint.directory.resolve():
        raise CheckpointError(f"{checkpoint.directory} would replace itself: choose another directory to save to")
    check_outside_checkpoints(root, "--save")
    plans = list(plan_files(checkpoint, target))  # all first: indivisible rows are found before a write
    losses: list[str] = []
    with RunLock(root, losses.append, key="--save"):
        if not allow_existing:
            check_destination(checkpoint, root, step)
        directory = prepare_directory(root, step, sum(plan.nbytes for plan in plans))
        try:
            written = []
            for group in checkpoint.groups():
                of_group = [plan for plan in plans if plan.group == group]
                written += _write_group(checkpoint, directory, group=group, plans=of_group, progress=progress)
            check_source()
            _check_not_lost(losses)
            return publish(root, step, record=checkpoint.record, written=written, source=checkpoint.directory)
        except BaseException:
            abandon(root, step)
            raise


def _check_not_lost(losses: Sequence[str]) -> None:
    if losses:
        raise CheckpointError(losses[0])


def plan_files(checkpoint: Checkpoint, target: Target) -> Iterator[FilePlan]:
    """Return every file of the target layout. Raises CheckpointError if rows are not divisible by its ranks."""
    for group in checkpoint.groups():
        stages: list[list[Parameter]] = [[] for _ in target.stages]
        for parameter in held_parameters(checkpoint, group):
            stages[target.stage_of(parameter)].append(parameter)
        for stage, parameters in enumerate(stages):
            for rank in range(target.tensor_parallel):
                specs = []
                for parameter in parameters:
                    ranks = target.num_parts(parameter)
                    if rank < ranks:
                        specs.append(_spec(checkpoint, group, parameter.name, rank=rank, ranks=ranks))
                if specs:
                    yield FilePlan(group, f"{group}-pp{stage:02d}-tp{rank:02d}-dp00.safetensors", specs)


def _spec(checkpoint: Checkpoint, group: str, name: str, *, rank: int, ranks: int) -> PieceSpec:
    shape = checkpoint.shape(group, name)
    if shape[0] % ranks:
        raise CheckpointError(
            f"{name} has {shape[0]} rows, which {ranks} tensor-parallel ranks cannot share equally: "
            f"choose a tensor-parallel size that divides {shape[0]}"
        )
    return PieceSpec(name, checkpoint.dtype(group, name), shape, *split_rows(shape[0], ranks, rank))


def _write_group(
    checkpoint: Checkpoint, directory: Path, *, group: str, plans: list[FilePlan], progress: Callable[[int], object]
) -> list[Written]:
    """Write the files of one group; they become complete one pipeline stage after another."""
    pieces = []
    for plan in plans:
        pieces += [(spec, plan) for spec in plan.specs]
    order = {name: place for place, name in enumerate(checkpoint.names(group))}
    # by tensor, then by row: the order within the source's files and within each target file
    pieces.sort(key=lambda piece: (order[piece[0].name], piece[0].start))
    left = {plan.name: len(plan.specs) for plan in plans}
    files: dict[str, ShardFileWriter] = {}
    finished: list[Future[None]] = []
    # the reader computes alone, as torch's own threads would wait actively for the next block
    with (
        computed_ahead(_blocks(checkpoint, pieces), depth=_BLOCKS_AHEAD, initializer=_use_one_thread) as blocks,
        ExitStack() as stack,
        ThreadPoolExecutor(1) as flusher,
    ):
        for plan, rows, is_last in blocks:
            if plan.name not in files:
                files[plan.name] = ShardFileWriter(directory / plan.name, plan.specs)
                stack.push(files[plan.name])  # closes it if any other fails
            files[plan.name].write(rows)
            progress(rows.nbytes)
            left[plan.name] -= is_last
            # flushing waits for the disk: a thread does it while the next files are written
            if not left[plan.name]:
                finished.append(flusher.submit(files[plan.name].finish))
        for flushed in finished:
            flushed.result()  # raises the flush's error, if any
    return [files[plan.name].written(plan.group) for plan in plans]


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _blocks(
    checkpoint: Checkpoint, pieces: list[tuple[PieceSpec, FilePlan]]
) -> Iterator[tuple[FilePlan, Tensor, bool]]:
    """Yield (file, rows, whether they are the last of their piece)."""
    for spec, plan in pieces:
        row = spec.start
        for rows in read_blocks(checkpoint, plan.group, spec.name, start=spec.start, stop=spec.stop):
            row += len(rows)
            yield plan, rows, row == spec.stop
