"""Repartitioning, with or without growth: a checkpoint streamed into files for another layout.

Each rank of the target layout gets a file of its own for each group. Memory is bounded by a buffer, not by the model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from megatron_tf.checkpoint.commit import prepare, temporary_directory
from megatron_tf.checkpoint.format import CheckpointError, PieceFileWriter, PieceSpec
from megatron_tf.checkpoint.growth import GrowthPlan
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.save import Written, complete
from megatron_tf.parallel.sharding import split_rows

BUFFER_BYTES = 64 << 20


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

    Everything in it comes along: parameters, moments, progress, tau, lineage. Raises CheckpointError where rows don't
    divide or the source is damaged.
    """
    plans = list(plan_files(source, target, growth))
    total = sum(spec.nbytes for _, _, specs in plans for spec in specs)
    prepare(root, source.step, total)
    directory, written = temporary_directory(root, source.step), []
    with tqdm(total=total, unit="B", unit_scale=True, disable=not show_progress) as bar:
        for group, file_name, specs in plans:
            with PieceFileWriter(directory / file_name, specs) as file:
                for spec in specs:
                    for rows in _stream(source, group, spec, growth):
                        file.write(rows)
                        bar.update(rows.nbytes)
            pieces = [(group, spec, piece) for spec, piece in file.pieces()]
            written.append(Written({file_name: file.entry()}, pieces))
    metadata = source.metadata if growth is None else growth.grown_metadata(source.metadata)
    return complete(root, source.step, metadata, written)


def plan_files(
    source: CheckpointReader, target: Target, growth: GrowthPlan | None
) -> Iterator[tuple[str, str, list[PieceSpec]]]:
    """(group, file name, contents) of every file of the target layout."""
    for group in source.groups():
        for stage in range(target.pipeline_parallel):
            for rank in range(target.tensor_parallel):
                specs = [
                    spec
                    for name in source.names(group)
                    if target.stage_of(name) == stage and (spec := _spec(source, group, name, rank, target, growth))
                ]
                if specs:
                    yield group, f"{group}-pp{stage:02d}-tp{rank:02d}-dp00.safetensors", specs


def _spec(
    source: CheckpointReader, group: str, name: str, rank: int, target: Target, growth: GrowthPlan | None
) -> PieceSpec | None:
    shape = source.shape(group, name)
    rows = shape[0] if growth is None else growth.rows(name, shape[0])
    ranks = target.tensor_parallel
    start, stop = 0, rows
    if target.is_replicated(name):
        if rank:
            return None
    else:
        if rows % ranks:
            raise CheckpointError(f"{name} has {rows} rows, which {ranks} tensor-parallel ranks cannot share equally")
        start, stop = split_rows(rows, ranks, rank)
    return PieceSpec(name, source.dtype(group, name), (rows, *shape[1:]), start, stop)


def _stream(source: CheckpointReader, group: str, spec: PieceSpec, growth: GrowthPlan | None) -> Iterator[Tensor]:
    row_bytes = spec.nbytes // (spec.stop - spec.start)
    step = max(1, BUFFER_BYTES // row_bytes)
    old = source.shape(group, spec.name)[0]
    for start in range(spec.start, min(spec.stop, old), step):
        yield source.read_rows(group, spec.name, start, min(start + step, spec.stop, old))
    if growth is not None:
        for start in range(max(spec.start, old), spec.stop, step):
            stop = min(start + step, spec.stop)
            yield growth.new_rows(group, spec.name, start, stop, spec.shape[1], spec.dtype)
