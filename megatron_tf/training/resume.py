"""Where a run goes on from: its newest sound checkpoint, at the stage of growth that is due."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.commit import complete_checkpoints, newest_checkpoint
from megatron_tf.checkpoint.format import LATEST, CheckpointError, DamagedCheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.config import ParallelConfig, RunConfig
from megatron_tf.data.blend import SPACED
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.checkpointing import (
    Progress,
    blend_of,
    changes_since,
    new_progress,
    restore_state,
    stage_reached,
    starts_over,
)
from megatron_tf.training.state import TrainState


@dataclass(frozen=True)
class Begun:
    """A run that can take its next step."""

    stage: int
    """Stages of growth it has behind it."""
    state: TrainState
    progress: Progress
    origin: Path | None
    """The checkpoint it comes from; None for a new run."""
    damaged: tuple[str, ...]
    """Newer checkpoints that could not be used, and why."""
    changes: str = ""
    """Keys of the configuration that differ from the checkpoint's."""


def begin(
    config: RunConfig,
    mesh: Mesh,
    tokenizer: dict[str, Any],
    build: Callable[[RunConfig], TrainState],
    data: Sequence[dict[str, Any]] = (),
) -> Begun:
    """Restore the newest checkpoint that is sound on every rank, which all call this, or begin a new run.

    `build` makes the state of a stage's configuration. Raises CheckpointError where there are checkpoints and none is
    sound, or where the one to restore is of another model, tokenizer or layout, or of other `data` or keys that
    change what it means.
    """
    damaged: list[str] = []
    for source in sources(config):
        outcome = _restore(config, mesh, tokenizer, build, data, source)
        if reason := mesh.first_failure(outcome if isinstance(outcome, str) else None):
            damaged.append(reason)
            continue
        assert not isinstance(outcome, str)
        stage, state, progress, changes = outcome
        return Begun(stage, state, progress, source, tuple(damaged), changes)
    if damaged:
        raise CheckpointError(f"no sound checkpoint is left: {'; '.join(damaged)}")
    return Begun(0, build(config.at_stage(0)), new_progress(config.model, tokenizer, data), None, ())


def sources(config: RunConfig) -> list[Path]:
    """Checkpoints to go on from: those in `checkpoint.save` from the newest on, or else `checkpoint.load`."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None or not ((save / LATEST).exists() or complete_checkpoints(save)):
        if load is not None and not load.exists():
            raise CheckpointError(f"checkpoint.load: {load} does not exist")
        return [] if load is None else [load]
    older = complete_checkpoints(save)[::-1]
    try:
        newest = newest_checkpoint(save)
    except (CheckpointError, OSError):  # `latest` itself is damaged or gone
        return older
    return [*filter(Path.exists, [newest]), *(path for path in older if path != newest)]


def blend_of_run(config: RunConfig) -> str:
    """Name the blend in which a run of this configuration reads: its newest checkpoint's, or that of new runs."""
    if len(config.data.data_path) > 1:
        for source in sources(config):
            if starts_over(config, source):
                break
            try:
                return blend_of(CheckpointReader(source).metadata)
            except DamagedCheckpointError:
                continue
    return SPACED


def first_stage(config: RunConfig) -> int:
    """Stages of growth that a run is to have behind it when it begins, as far as can be told without its tensors."""
    for source in sources(config):
        try:
            return stage_reached(config, source)
        except DamagedCheckpointError:
            continue
    return 0


def has_layout(parallel: ParallelConfig, mesh: Mesh) -> bool:
    """Whether the mesh is the one that is asked for."""
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return sizes == (mesh.size("tp"), mesh.size("pp"))


def _restore(
    config: RunConfig,
    mesh: Mesh,
    tokenizer: dict[str, Any],
    build: Callable[[RunConfig], TrainState],
    data: Sequence[dict[str, Any]],
    source: Path,
) -> tuple[int, TrainState, Progress, str] | str:
    """(stage, state, progress, changes), or why the checkpoint can't be used."""
    try:
        stage = stage_reached(config, source)
        if not has_layout(config.at_stage(stage).parallel, mesh):
            raise CheckpointError(
                f"{source} is of a stage with another layout than the ranks that were started: remove the damaged "
                f"checkpoint beside it and start again"
            )
        changes = changes_since(config, data, source)
        state = build(config.at_stage(stage))
        return stage, state, restore_state(state, config, tokenizer, source, data), changes
    except DamagedCheckpointError as error:
        return str(error)
