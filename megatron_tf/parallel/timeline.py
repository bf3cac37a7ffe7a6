"""When each rank of a pipeline computes what, and how long it waits, by the order of a schedule and assumed costs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megatron_tf.config import PipelineSchedule
from megatron_tf.parallel.schedules import SCHEDULES, make_schedule
from megatron_tf.parallel.stages import stages_of_rank

Kind = Literal["F", "B", "I", "W"]
"""Forward, whole backward, and its two halves: for the input and for the weights."""
_KINDS: Mapping[str, Kind] = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


@dataclass(frozen=True)
class Action:
    """One pass of a micro-batch through a stage."""

    kind: Kind
    stage: int
    micro_batch: int


class ActionCosts(Protocol):
    """Time of each action, in any unit."""

    def of(self, action: Action) -> int:
        """Return the time of an action."""


@dataclass(frozen=True)
class Costs(ActionCosts):
    """Time of each pass through a stage, the same for all stages, in any unit."""

    forward: int = 1
    backward_input: int = 1
    backward_weight: int = 1

    def of(self, action: Action) -> int:
        """Return the time of an action."""
        whole = self.backward_input + self.backward_weight
        return {"F": self.forward, "I": self.backward_input, "W": self.backward_weight, "B": whole}[action.kind]


@dataclass(frozen=True)
class Slot:
    """An action of a rank, and when it starts."""

    rank: int
    action: Action
    start: int
    stop: int


@dataclass(frozen=True)
class Pipeline:
    """A schedule and the sizes it is made for."""

    schedule: PipelineSchedule
    ranks: int
    per_rank: int
    """Stages on each rank."""
    micro_batches: int

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages that a rank runs, in order."""
        is_v = SCHEDULES[self.schedule].is_v
        return stages_of_rank(rank, ranks=self.ranks, per_rank=self.per_rank, is_v=is_v)


@dataclass
class _PlannedStage:
    """What a schedule of torch reads of a stage to make its order, without a model or other ranks."""

    stage_index: int
    num_stages: int
    group_rank: int
    group_size: int
    submod: None = None
    has_backward: bool = True
    stage_index_to_group_rank: dict[int, int] = field(default_factory=dict)


def orders(pipeline: Pipeline) -> list[list[Action]]:
    """Return what each rank computes, in order."""
    ranks, count = pipeline.ranks, pipeline.micro_batches
    if pipeline.schedule == "gpipe":
        return [_one_forward_one_backward(rank, warm_up=count, count=count) for rank in range(ranks)]
    if pipeline.schedule == "1f1b":
        return [_one_forward_one_backward(rank, warm_up=ranks - 1 - rank, count=count) for rank in range(ranks)]
    planned: list[Any] = [
        _PlannedStage(stage, ranks * pipeline.per_rank, group_rank=0, group_size=ranks)
        for stage in pipeline.stages_of(0)
    ]
    made = make_schedule(pipeline.schedule, planned, count).pipeline_order
    assert made is not None
    return [list(_actions(made[rank])) for rank in range(ranks)]


def _one_forward_one_backward(rank: int, *, warm_up: int, count: int) -> list[Action]:
    """Return the order of a rank with one stage, which runs `warm_up` forwards before the first backward.

    torch.distributed.pipelining runs it without a list; that of torch 2.13 numbers the micro-batches wrongly.
    """
    forwards = [Action("F", rank, i) for i in range(count)]
    backwards = [Action("B", rank, i) for i in range(count)]
    steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
    return [*forwards[:warm_up], *steady, *backwards[max(0, count - warm_up) :]]


def _actions(listed: Sequence[Any]) -> Iterator[Action]:
    """Yield torch's actions of a rank as ours; None stands for waiting."""
    for action in listed:
        for part in (action.sub_actions or (action,)) if action is not None else ():
            if part.computation_type.name in _KINDS:
                yield Action(_KINDS[part.computation_type.name], part.stage_index, part.microbatch_index)


def timeline(pipeline: Pipeline, costs: ActionCosts, made: Sequence[Sequence[Action]] | None = None) -> list[Slot]:
    """Return when each action runs if messages take no time; each rank keeps its order.

    `made` are the `orders` of the pipeline, if they exist already.

    Raises AssertionError if the ranks would wait for each other forever.
    """
    last = pipeline.ranks * pipeline.per_rank - 1
    waiting = [iter(order) for order in (made or orders(pipeline))]
    following = [next(order, None) for order in waiting]
    free = [0] * pipeline.ranks
    done: dict[Action, int] = {}
    slots: list[Slot] = []
    while any(following):
        before = len(slots)
        for rank, order in enumerate(waiting):
            while (action := following[rank]) is not None and (ready := _ready(action, done, last)) is not None:
                start = max(free[rank], ready)
                free[rank] = done[action] = start + costs.of(action)
                slots.append(Slot(rank, action, start=start, stop=free[rank]))
                following[rank] = next(order, None)
        assert len(slots) > before, f"the ranks wait for each other: {following}"
    return slots


def _ready(action: Action, done: Mapping[Action, int], last: int) -> int | None:
    """Return when what an action needs is there; None if that has not been computed yet."""
    kind, stage, micro_batch = action.kind, action.stage, action.micro_batch
    if kind == "W" or (kind == "F" and stage == 0):  # the rank's order puts W after its I
        return 0
    if kind == "F":
        return done.get(Action("F", stage - 1, micro_batch))
    if stage == last:
        return done.get(Action("F", stage, micro_batch))
    return done.get(Action("I", stage + 1, micro_batch), done.get(Action("B", stage + 1, micro_batch)))


def bubble_fraction(slots: Sequence[Slot]) -> float:
    """Return the part of the time, until the last rank is done, that an average rank waits."""
    ranks, end = len({slot.rank for slot in slots}), max(slot.stop for slot in slots)
    return 1 - sum(slot.stop - slot.start for slot in slots) / (ranks * end)


def theoretical_bubble_fraction(pipeline: Pipeline, costs: Costs) -> float:
    """Return the bubble fraction by the formula of the schedule's paper, for many micro-batches.

    GPipe and 1F1B, also interleaved: (p - 1)(F + I + W), arXiv 2104.04473. Zero bubble (ZB-H1): (p - 1)(F + I - W),
    arXiv 2401.10241. ZB-V has no bubble in that paper if F = I = W and a rank may start its next step early; here
    every step ends with a wait for all ranks, so that (p - 1) F is left. DualPipeV: (p - 1)(F&B + B - 3 W) with
    F&B = F + I + W, without overlap of a forward with a backward; github.com/deepseek-ai/DualPipe. All with the costs
    of one stage, over the bubble plus the work of a rank.
    """
    f, i, w = costs.forward, costs.backward_input, costs.backward_weight
    waits: Mapping[PipelineSchedule, int] = {
        "gpipe": f + i + w,
        "1f1b": f + i + w,
        "interleaved_1f1b": f + i + w,
        "interleaved_zero_bubble": f + i - w,
        "zbv": f,
        "dualpipev": f + 2 * i - w,
    }
    bubble = (pipeline.ranks - 1) * waits[pipeline.schedule]
    return bubble / (bubble + pipeline.micro_batches * pipeline.per_rank * (f + i + w))
