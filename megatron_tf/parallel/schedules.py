"""The pipeline schedules of torch.distributed.pipelining by name, what each one needs, and their forward-only form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from megatron_tf.config import PipelineSchedule

Schedule = PipelineScheduleMulti | PipelineScheduleSingle


@dataclass(frozen=True)
class ScheduleKind:
    """A schedule of torch, and what it means for the model."""

    torch_class: type[Any]
    is_v: bool = False
    """Whether the stages are placed on the ranks back and forth (a V), which puts the first and the last on one."""
    splits_backward: bool = False
    """Whether the gradients of a stage's parameters are computed later than that of its input."""


SCHEDULES: Mapping[PipelineSchedule, ScheduleKind] = {
    "gpipe": ScheduleKind(ScheduleGPipe),
    "1f1b": ScheduleKind(Schedule1F1B),
    "interleaved_1f1b": ScheduleKind(ScheduleInterleaved1F1B),
    "interleaved_zero_bubble": ScheduleKind(ScheduleInterleavedZeroBubble, splits_backward=True),
    "zbv": ScheduleKind(ScheduleZBVZeroBubble, is_v=True, splits_backward=True),
    "dualpipev": ScheduleKind(ScheduleDualPipeV, is_v=True, splits_backward=True),
}


def needed_micro_batches(schedule: PipelineSchedule, count: int, ranks: int) -> str | None:
    """Return what `schedule` over `ranks` pipeline ranks needs of the number of micro-batches if `count` is not enough.

    Otherwise, None.
    """
    rounds = max(1, count // ranks)
    if schedule == "1f1b" and count < ranks:
        return f"at least {ranks}"
    if schedule == "dualpipev" and count < 2 * ranks:
        return f"at least {2 * ranks}"
    if schedule.startswith("interleaved") and count % rounds:
        return f"a multiple of {ranks}"
    return None


def make_schedule(schedule: PipelineSchedule, stages: Sequence[PipelineStage], count: int) -> Schedule:
    """Make the schedule of `count` micro-batches; the stages of the last rank return the loss."""
    torch_class = SCHEDULES[schedule].torch_class
    # the loss is divided already, so the schedule must not divide gradients by `count`
    options = {"loss_fn": lambda loss, _: loss, "scale_grads": False}
    is_single = issubclass(torch_class, PipelineScheduleSingle)
    made: Schedule = torch_class(stages[0] if is_single else list(stages), count, **options)
    return made


def make_evaluation(schedule: PipelineSchedule, stages: Sequence[PipelineStage], count: int) -> Schedule:
    """Make a schedule for `eval` of `count` micro-batches, with the stages placed as for `schedule`."""
    if issubclass(SCHEDULES[schedule].torch_class, PipelineScheduleSingle):
        return make_schedule("gpipe", stages, count)
    made = make_schedule(schedule, stages, count)
    # private: torch has no forward-only schedule of several stages, and `eval` of a V fails in the skipped backward
    orders = made.pipeline_order_with_comms  # type: ignore[union-attr]
    for rank, actions in orders.items():
        orders[rank] = [kept for action in actions for kept in _forward_actions(action)]
    return made


def _forward_actions(action: Any) -> list[Any]:
    """Return the parts of an action that evaluation needs: computing, communicating and gathering for forward."""
    parts = action.sub_actions or (action,)
    return [part for part in parts if part.computation_type.name in _OF_FORWARD]


_OF_FORWARD = ("FORWARD", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
