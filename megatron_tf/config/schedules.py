"""The learning-rate schedules of growth stages: which one is in force, and where it ends."""

import dataclasses
from collections.abc import Sequence

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.growth import GrowthStage
from megatron_tf.config.optimizer import ScheduleConfig


def schedule_after(growth: Sequence[GrowthStage], number: int) -> ScheduleConfig | None:
    """Return the schedule that the first `number` stages leave in force; None for the run's own.

    A schedule that gives no end gets one as `lr_decay_iters`: where the next schedule starts. The last one stays
    without, and ends with the run.
    """
    index = stage_of_schedule(growth, number)
    if index is None:
        return None
    schedule, following = growth[index].optimizer, _following(growth, index)
    assert schedule is not None
    if following is None or not schedule.needs_end:
        return schedule
    start, end = growth[index].at_step, growth[following].at_step
    assert start is not None  # ensured by `check_schedules`
    assert end is not None
    return dataclasses.replace(schedule, lr_decay_iters=end - start)


def stage_of_schedule(growth: Sequence[GrowthStage], number: int) -> int | None:
    """Return the index of the last of the first `number` stages that has a schedule; None if none has."""
    return max((index for index in range(number) if growth[index].optimizer is not None), default=None)


def check_schedules(growth: Sequence[GrowthStage], train_iters: int) -> None:
    """Raise ConfigError, naming the stage, if the end of a schedule is unknown, or before that of one of its parts.

    Each stage has either `at_step` or `at_tokens`, and `at_step` increases. A last stage after the end of the run is
    skipped, so that a run can be shortened.
    """
    for index, stage in enumerate(growth):
        if stage.optimizer is None or not stage.optimizer.needs_end:
            continue
        start, following = stage.at_step, _following(growth, index)
        key: str = "training.train_iters"
        end: int | None = train_iters
        if following is not None:
            key, end = f"growth[{following}].at_step", growth[following].at_step
        if start is None or end is None:
            raise ConfigError(
                f"growth[{index}].optimizer: its length in steps is unknown because growth["
                f"{index if start is None else following}] is at_tokens: give lr_decay_iters or lr_decay_tokens"
            )
        if following is None and start >= train_iters:
            continue
        try:
            stage.optimizer.check_end("iters", f"{key} - growth[{index}].at_step", end - start)
        except ConfigError as error:
            raise ConfigError(f"growth[{index}].optimizer: {error}") from None


def _following(growth: Sequence[GrowthStage], index: int) -> int | None:
    """Return the index of the next stage that has a schedule; None if none has."""
    return next((later for later in range(index + 1, len(growth)) if growth[later].optimizer is not None), None)
