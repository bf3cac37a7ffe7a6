"""Where the learning-rate schedule of a restored run counts from."""

from pathlib import Path

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.schedule_start import ScheduleStart
from megatron_tf.config import ConfigError, RunConfig
from megatron_tf.config.schedules import stage_of_schedule


def restored_start(
    config: RunConfig, record: RunRecord, *, stage: int, phases: int = 0, source: Path
) -> ScheduleStart | None:
    """Return the start of the schedule in force after `stage` stages, for a run that resumes with `record`.

    `config` is the run's before any growth and the first `phases` phases of its data. Raises CheckpointError if a stage
    that the checkpoint `source` has completed has got a schedule since then, ConfigError if too few steps are left for
    the warm-up or the decay.
    """
    start, index = record.schedule_start, stage_of_schedule(config.growth, stage)
    if start is None and index is not None:
        if record.training.step:
            raise CheckpointError(
                f"{source} was grown without growth[{index}].optimizer, so its record has no start for this schedule: "
                f"remove it, or resume from a checkpoint before the growth"
            )
        start = ScheduleStart()
    if start is not None and record.training.step < config.training.train_iters:
        _check_end(config.at_stage(stage, phases), start)
    return start


def _check_end(config: RunConfig, start: ScheduleStart) -> None:
    """Raise ConfigError if the rest of the run is too short for a schedule that ends with it."""
    if not config.optimizer.needs_end:
        return
    steps = config.training.train_iters - start.step
    try:
        config.optimizer.check_end("iters", "training.train_iters - schedule_start.step", steps)
    except ConfigError as error:
        raise ConfigError(f"optimizer: {error}") from None
