"""Checks, before the first step, of the stages of growth and phases of the data that a run has not reached."""

from collections.abc import Iterator
from pathlib import Path

from megatron_tf.config import ConfigError, RunConfig
from megatron_tf.config.moment import name_of_stage, reachable
from megatron_tf.data.build import open_phase, training_prefixes
from megatron_tf.errors import UserError
from megatron_tf.parallel.collectives import group_size
from megatron_tf.parallel.mesh import LayoutError, Mesh, replicas_of
from megatron_tf.training.run.resume import RestoredRun
from megatron_tf.training.run.utility import check_utility_data
from megatron_tf.training.step.batch_sizes import check_batch_sizes


def check_stages(config: RunConfig, run: RestoredRun) -> None:
    """Check what the stages that `run` has not reached need: ranks, batch sizes, data. Collective.

    Raises ConfigError on every rank for what doesn't fit.
    """
    mesh = run.state.mesh
    for stage, phase in _ahead(config, run):
        try:
            _check_layout(config.at_stage(stage, phase), mesh)
        except (ConfigError, LayoutError) as error:
            raise ConfigError(f"{name_of_stage(stage, phase)}: {error}") from None
    if config.data.phases:
        _check_names(config)
    for number in range(run.phases, len(config.data.phases)):
        _check_data(config, number, run)
    check_utility_data(config, mesh, record=run.record, first=run.stage)


def _ahead(config: RunConfig, run: RestoredRun) -> Iterator[tuple[int, int]]:
    for stage, phase in reachable(config.growth, config.data.phases):
        if stage >= run.stage and phase >= run.phases and (stage, phase) != (run.stage, run.phases):
            yield stage, phase


def _check_names(config: RunConfig) -> None:
    """Raise ConfigError if two sets have the same name, by which phases know them."""
    prefixes: dict[str, str] = {}
    for key, prefix in training_prefixes(config.data):
        other = prefixes.setdefault(Path(prefix).name, prefix)
        if other != prefix:
            raise ConfigError(
                f"{key}: {other} and {prefix} have the same name, by which data.order lanes knows a set: rename the "
                f"files of one"
            )


def _check_data(config: RunConfig, number: int, run: RestoredRun) -> None:
    """Raise ConfigError on every rank if any of them can't read the sets of a phase. Collective."""
    failure = None
    try:
        staged = config.at_stage(run.stage, number + 1)
        open_phase(staged, sample=run.record.training.samples, saved=None)
    except (UserError, OSError) as error:
        failure = f"data.phases[{number}]: {error}"
    if reason := run.state.mesh.first_failure(failure):
        raise ConfigError(reason)


def _check_layout(config: RunConfig, mesh: Mesh) -> None:
    """Raise ConfigError or LayoutError if the layout or the batch size of a stage does not fit these ranks."""
    parallel = config.parallel
    pipeline = parallel.pipeline_model_parallel_size
    replicas = replicas_of(parallel, group_size(mesh.world))
    check_batch_sizes(config, pipeline, replicas)
