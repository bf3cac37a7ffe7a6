"""Repartitioning, with or without growth: a checkpoint streamed into files for another layout.

Each rank of the target layout gets a file of its own for each group. Memory is bounded by a block of rows, not by the
model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from megatron_tf.checkpoint.commit import abandon, prepare, publish, step_directory
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.growth import GrowthPlan
from megatron_tf.checkpoint.load import CheckpointReader, rows_per_block
from megatron_tf.checkpoint.pieces import PieceFileWriter, PieceSpec, Written
from megatron_tf.parallel.sharding import split_rows

FilePlan = tuple[str, str, list[PieceSpec]]
"""(group, file name, contents in the order they are written)."""


@dataclass(frozen=True)
class Target:
    """Where tensors go."""

    tensor_parallel: int
    pipeline_parallel: int
    stage_of: Callable[[str], int]
    """Name -> pipeline stage."""
    is_replicated: Callable[[str], bool]
    """Name -> whether every tensor-parallel rank holds it whole; it then lies in the first one's file."""


def reshard(
    source: CheckpointReader, root: Path, target: Target, growth: GrowthPlan | None, show_progress: bool
) -> Path:
    """Write `source`, grown if asked, for `target` under `root`; returns its directory.

    Everything in it comes along: parameters, moments, progress, tau, lineage. The new checkpoint appears when it is
    complete. Raises CheckpointError where rows don't divide, the source is damaged or the disk is too small.
    """
    step = source.step
    if step_directory(root, step).resolve() == source.directory.resolve():
        raise CheckpointError(f"{source.directory} would replace itself: choose another directory to save in")
    plans = list(plan_files(source, target, growth))
    total = sum(spec.nbytes for _, _, specs in plans for spec in specs)
    metadata = source.metadata if growth is None else growth.grown_metadata(source.metadata)
    directory = prepare(root, step, total)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, disable=not show_progress) as bar:
            written = [_write_file(source, directory, plan, growth, bar) for plan in plans]
        return publish(root, step, metadata, written)
    except BaseException:
        abandon(root, step)
        raise


def plan_files(source: CheckpointReader, target: Target, growth: GrowthPlan | None) -> Iterator[FilePlan]:
    """Every file of the target layout. Raises CheckpointError where rows don't divide by its ranks."""
    for group in source.groups():
        stages: list[list[str]] = [[] for _ in range(target.pipeline_parallel)]
        for name in source.names(group):
            stages[target.stage_of(name)].append(name)
        for stage, names in enumerate(stages):
            for rank in range(target.tensor_parallel):
                specs = [
                    _spec(source, group, name, rank, target, growth)
                    for name in names
                    if rank == 0 or not target.is_replicated(name)
                ]
                if specs:
                    yield group, f"{group}-pp{stage:02d}-tp{rank:02d}-dp00.safetensors", specs


def _spec(
    source: CheckpointReader, group: str, name: str, rank: int, target: Target, growth: GrowthPlan | None
) -> PieceSpec:
    shape = source.shape(group, name)
    rows = shape[0] if growth is None else growth.rows(name, shape[0])
    ranks = 1 if target.is_replicated(name) else target.tensor_parallel
    if rows % ranks:
        raise CheckpointError(
            f"{name} has {rows} rows, which {ranks} tensor-parallel ranks cannot share equally: "
            f"choose a tensor-parallel size that divides {rows}"
        )
    return PieceSpec(name, source.dtype(group, name), (rows, *shape[1:]), *split_rows(rows, ranks, rank))


def _write_file(
    source: CheckpointReader, directory: Path, plan: FilePlan, growth: GrowthPlan | None, bar: tqdm
) -> Written:
    group, file_name, specs = plan
    with PieceFileWriter(directory / file_name, specs) as file:
        for spec in specs:
            for rows in _stream(source, group, spec, growth):
                file.write(rows)
                bar.update(rows.nbytes)
    return file.written(group)


def _stream(source: CheckpointReader, group: str, spec: PieceSpec, growth: GrowthPlan | None) -> Iterator[Tensor]:
    """The piece's rows in blocks: old ones as they are in the source, then new ones."""
    old = source.shape(group, spec.name)[0]
    yield from source.read_blocks(group, spec.name, spec.start, min(spec.stop, old))
    if growth is not None:
        step = rows_per_block(spec.shape, spec.dtype)
        for start in range(max(spec.start, old), spec.stop, step):
            stop = min(start + step, spec.stop)
            yield growth.new_rows(group, spec.name, start, stop, spec.shape[1], spec.dtype)
