"""The time of a training step: what the busiest rank computes, what it waits for, and the update.

A pipeline runs as `parallel.timeline` says, with the times of each stage. If the cluster overlaps them with
computation, tensor-parallel ranks gather inputs and sum their gradients during a layer's backward, and with
`tp_comm_overlap_chunks` activations travel during the products of other chunks; keys and values go around a ring while
attention is computed, and data parallelism gathers parameters during a step's first forward and reduces gradients
during its last backward. All other messages are waited for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tf.parallel.schedules import SCHEDULES
from megatron_tf.parallel.timeline import Action, ActionCosts, Kind, timeline
from megatron_tf.planning.counts import PartCounter, Pass
from megatron_tf.planning.layout import PlannedLayout, Unit
from megatron_tf.planning.memory import shortened
from megatron_tf.planning.messages import hidden_bytes, rank_messages, unit_messages
from megatron_tf.planning.rates import Machine, collectives
from megatron_tf.training.dry_run.collectives import Traffic

_TICKS = 1e9  # a timeline counts in whole numbers: nanoseconds


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step, of the pipeline rank that works longest."""

    compute: float
    tensor: float
    """Waiting for tensor-parallel messages, as far as no products are computed meanwhile."""
    context: float
    """Waiting for context-parallel messages, as far as no attention is computed meanwhile."""
    pipeline: float
    """Sending hidden states and their gradients."""
    data: float
    """Gathering parameters and reducing gradients, as far as nothing is computed meanwhile."""
    bubble: float
    """Waiting for other stages."""
    update: float
    """The optimizer, and the agreement on norms, loss and stopping."""

    @property
    def total(self) -> float:
        """Return the time of the step."""
        return self.compute + self.tensor + self.context + self.pipeline + self.data + self.bubble + self.update


@dataclass(frozen=True)
class _StageTime:
    """Seconds of a micro-batch in one stage."""

    compute: Mapping[Kind, float]
    tensor: Mapping[Kind, float]
    context: Mapping[Kind, float]
    sends: Mapping[Kind, float]

    def of(self, kind: Kind) -> float:
        """Return the time of a pass."""
        return self.compute[kind] + self.tensor[kind] + self.context[kind] + self.sends[kind]


class _StageCosts(ActionCosts):
    def __init__(self, stages: Mapping[int, _StageTime]) -> None:
        self.ticks = {(kind, i): round(time.of(kind) * _TICKS) for i, time in stages.items() for kind in time.compute}

    def of(self, action: Action) -> int:
        return self.ticks[action.kind, action.stage]


def step_time(planned: PlannedLayout, machine: Machine, counter: PartCounter) -> StepTime:
    """Predict the time of a step."""
    ranks = range(planned.layout.pipeline)
    stages = {
        i: _stage_time(planned, i, machine=machine, counter=counter) for rank in ranks for i in planned.stages_of(rank)
    }
    kinds: tuple[Kind, ...] = ("F", "I", "W") if _splits(planned) else ("F", "B")

    def busy(rank: int) -> float:
        return sum(stages[i].of(kind) for i in planned.stages_of(rank) for kind in kinds)

    slowest = max(ranks, key=busy)
    mine = [stages[i] for i in planned.stages_of(slowest)]
    count = planned.micro_batches
    return StepTime(
        compute=count * sum(stage.compute[kind] for stage in mine for kind in kinds),
        tensor=count * sum(stage.tensor[kind] for stage in mine for kind in kinds),
        context=count * sum(stage.context[kind] for stage in mine for kind in kinds),
        pipeline=count * sum(stage.sends[kind] for stage in mine for kind in kinds),
        data=max(_data_time(planned, rank, stages=stages, machine=machine) for rank in ranks),
        bubble=_end(planned, stages, busy(slowest)) - count * busy(slowest),
        update=max(_update_time(planned, rank, machine=machine, counter=counter) for rank in ranks),
    )


def _splits(planned: PlannedLayout) -> bool:
    return planned.layout.pipeline > 1 and SCHEDULES[planned.config.parallel.pipeline_schedule].splits_backward


def _end(planned: PlannedLayout, stages: Mapping[int, _StageTime], busiest: float) -> float:
    """Return when the last rank is done; more micro-batches than fill the pipeline keep the busiest rank busy."""
    pipeline = planned.pipeline
    if pipeline.ranks == 1:
        return pipeline.micro_batches * busiest
    run = shortened(pipeline)
    end = max(slot.stop for slot in timeline(run, _StageCosts(stages), planned.model.orders(run))) / _TICKS
    return end + (pipeline.micro_batches - run.micro_batches) * busiest


def _stage_time(planned: PlannedLayout, number: int, *, machine: Machine, counter: PartCounter) -> _StageTime:
    compute: dict[Kind, float] = {"F": 0.0, "B": 0.0}
    tensor: dict[Kind, float] = {"F": 0.0, "B": 0.0}
    first_half = 0.0
    context: dict[Kind, float] = {"F": 0.0, "B": 0.0}
    passes: tuple[Kind, Kind] = "F", "B"
    for parts in planned.stages[number].parts:
        counts = counter.count(planned.config, parts.name, parts.layer)
        seconds = machine.part(planned, parts.name, parts.layer)
        for kind, each, took in zip(passes, (counts.forward, counts.backward), seconds, strict=True):
            compute[kind] += parts.count * took.total
            meanwhile = _products_meanwhile(planned, seconds.forward.total - seconds.forward.attention)
            tensor[kind] += parts.count * _tensor_time(planned, each, machine, hidden=meanwhile[kind])
            if kind == "B":
                first_half += parts.count * _tensor_time(planned, each, machine, hidden=meanwhile["I"])
            context[kind] += parts.count * _context_time(planned, each, machine, attention=took.attention)
    receivers = zip(passes, (number + 1, number - 1), strict=True)
    sends: dict[Kind, float] = {kind: _send_time(planned, number, to=to, machine=machine) for kind, to in receivers}
    # the second half, the gradients of the parameters, are two of the four products of backward
    compute |= {"I": compute["B"] / 2, "W": compute["B"] / 2}
    tensor |= {"I": first_half, "W": 0.0}
    context |= {"I": context["B"], "W": 0.0}
    sends |= {"I": sends["B"], "W": 0.0}
    return _StageTime(compute=compute, tensor=tensor, context=context, sends=sends)


def _products_meanwhile(planned: PlannedLayout, forward: float) -> dict[Kind, float]:
    """Return how long products run in each pass while asynchronous messages between tensor-parallel ranks travel.

    `forward` is the time of forward's two products. The first or the last of c chunks is waited for, so (c - 1) / c of
    it hide messages. In backward, gradients of outputs arrive during the one product that takes them, and the others
    travel during the two products of the tokens' gradients; in a first half, which has none of those, during dx's.
    """
    chunks = planned.config.parallel.tp_comm_overlap_chunks
    share = (chunks - 1) / chunks
    return {"F": forward * share, "B": forward * (1 + share / 2), "I": forward * share}


def _tensor_time(planned: PlannedLayout, counts: Pass, machine: Machine, *, hidden: float) -> float:
    """Return the time that a pass waits for messages between tensor-parallel ranks.

    Those that are asynchronous travel while products run, for as long as `hidden`.
    """
    messages = [each for each in counts.traffic if each.axis == "tp"]
    waited, overlapped = (
        collectives(
            machine,
            [each for each in messages if each.is_overlapped == is_overlapped],
            size=planned.layout.tensor,
            stride=1,
        )
        for is_overlapped in (False, True)
    )
    return waited + (max(0.0, overlapped - hidden) if machine.overlaps else overlapped)


def _context_time(planned: PlannedLayout, counts: Pass, machine: Machine, *, attention: float) -> float:
    """Return the time that a pass waits for messages between context-parallel ranks.

    In a ring they overlap with the `attention` to the keys and values at hand, in all steps but one.
    """
    layout, is_ring = planned.layout, planned.config.parallel.context_parallel_method == "ring"
    # a rank receives while it sends
    traffic = [each for each in counts.traffic if each.axis == "cp" and each.kind != "receive"]
    seconds = collectives(machine, traffic, size=layout.context, stride=layout.tensor)
    hidden = attention * (layout.context - 1) / layout.context if is_ring and machine.overlaps else 0.0
    return max(0.0, seconds - hidden)


def _send_time(planned: PlannedLayout, stage: int, *, to: int, machine: Machine) -> float:
    """Return the time to send a micro-batch from one stage to another."""
    pipeline = planned.pipeline
    if not 0 <= to < pipeline.ranks * pipeline.per_rank or planned.rank_of(stage) == planned.rank_of(to):
        return 0.0
    traffic = Traffic("send", "pp", calls=1, bytes=hidden_bytes(planned))
    # a pair of neighbors, as far apart as all ranks of a stage
    return machine.collective(traffic, size=2, stride=planned.world_size // planned.layout.pipeline)


def _data_time(planned: PlannedLayout, rank: int, *, stages: Mapping[int, _StageTime], machine: Machine) -> float:
    """Return how long a rank waits for parameters and for the reduction of gradients."""
    if not planned.is_gathered:
        return 0.0
    units = list(planned.units_of(rank))
    times = [_unit_time(planned, unit, machine) for unit in units]
    gathers, reductions = sum(gather for gather, _ in times), sum(reduction for _, reduction in times)
    if not machine.overlaps:
        return gathers + reductions
    repeats = planned.micro_batches if planned.config.parallel.reshard_after_forward else 1
    mine = [stages[i] for i in planned.stages_of(rank)]
    forward, backward = (repeats * sum(stage.of(kind) for stage in mine) for kind in ("F", "B"))
    first = max(times)  # a gather before the first layer, and a reduction after the last one, have nothing to overlap
    return max(gathers - forward, first[0] / repeats) + max(reductions - backward, first[1] / repeats)


def _unit_time(planned: PlannedLayout, unit: Unit, machine: Machine) -> tuple[float, float]:
    """Return the time to gather a unit in a step, and that to reduce its gradients."""
    tensor = planned.layout.tensor
    gather = reduction = 0.0
    for each in unit_messages(planned, unit):
        is_between_copies = each.kind == "all-reduce"
        size = planned.copies if is_between_copies else planned.sharing
        stride = tensor * planned.sharing if is_between_copies else tensor
        seconds = machine.collective(each, size=size, stride=stride)
        if each.kind == "all-gather":
            gather += seconds
        else:
            reduction += seconds
    return gather, reduction


def _update_time(planned: PlannedLayout, rank: int, *, machine: Machine, counter: PartCounter) -> float:
    numbers = sum(planned.held(unit) for unit in planned.units_of(rank))
    seconds = machine.update(planned, numbers)
    world = planned.world_size
    small = [each for each in rank_messages(planned, rank, counter) if each.axis in ("tied", "world")]
    return seconds + collectives(machine, small, size=world, stride=1)
