"""The peak memory of a rank in a training step: a step in the order of its schedule, part by part.

At the start a rank holds its parameters and its optimizer state. What comes on top, in this order:

| event | adds | frees |
|---|---|---|
| first forward of a layer | its gathered parameters, its 16-bit copies | |
| forward of a part | what backward reads; what it needs meanwhile | |
| backward of a part | what it needs meanwhile | what backward has read |
| first backward of a layer | its gradients | |
| its last backward, if it is sharded | its reduced gradients, a buffer | its gradients, its gathered parameters |
| update | | |

What a part keeps and needs is counted in the trainer's code (`counts`), the rest follows from the layout.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_tf.parallel.timeline import Action, Kind, Pipeline
from megatron_tf.planning.counts import PartCounter
from megatron_tf.planning.layout import Parts, PlannedLayout, Stage, Unit
from megatron_tf.planning.messages import gathered_bytes, hidden_bytes, neighbors

_ID_BYTES = 8
_WHOLE_COPIES, _CUT_COPIES = 1, 2  # of a batch on its device: as read; this rank's inputs and targets


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a rank in a step."""

    rank: int
    """Of the pipeline."""
    kinds: Mapping[str, int]
    """Bytes by kind: parameters, optimizer, gradients, gathered, copies, activations, temporary, batch."""

    @property
    def bytes(self) -> int:
        """Return the sum of all kinds."""
        return sum(self.kinds.values())


class _Run:
    """Parts that are alike in a layout: what one of them needs, in bytes."""

    def __init__(self, planned: PlannedLayout, parts: Parts, stage: Stage, counter: PartCounter) -> None:
        self.count = parts.count
        self.counts = counter.count(planned.config, parts.name, parts.layer)
        self.between_halves = planned.kept_between_halves(parts)
        unit = parts.unit or Unit([], False)
        self.is_sharded = planned.is_gathered
        self.reshards = planned.reshards(unit)
        self.gathered = gathered_bytes(planned, unit) if self.is_sharded else 0
        self.copies = planned.cast(unit, has_head=stage.has_head) * planned.activation_bytes
        self.gradient = planned.whole(unit) * planned.parameter_bytes
        self.reduced = planned.held(unit) * planned.parameter_bytes
        # a reduce-scatter reads a copy of the gradients; between whole copies they are reduced in place
        self.buffer = planned.gathered(unit) * planned.parameter_bytes if planned.sharing > 1 else 0
        self.pending = _pending_bytes(planned, parts, stage)


def _pending_bytes(planned: PlannedLayout, parts: Parts, stage: Stage) -> int:
    """Return the bytes that autograd holds after a part's backward: the head's gradient of a tied embedding.

    It waits for that of the lookup, which frees it.
    """
    is_tied = not planned.config.model.untie_embeddings_and_output_weights
    has_both = stage.has_head and stage.parts[0].name == "embedding"
    if not (is_tied and has_both) or parts.name == "layer":
        return 0
    model = planned.config.model
    size = model.padded_vocab_size // planned.layout.tensor * model.hidden_size * planned.parameter_bytes
    return size if parts.name == "head" else -size


def peak_memory(planned: PlannedLayout, counter: PartCounter) -> Peak:
    """Return the peak of the rank that has the highest one."""
    peaks = [rank_peak(planned, rank, counter) for rank in range(planned.layout.pipeline)]
    return max(peaks, key=lambda peak: peak.bytes)


def rank_peak(planned: PlannedLayout, rank: int, counter: PartCounter) -> Peak:
    """Return the peak of a pipeline rank."""
    step, runs = _Step(planned, rank), {}
    for number in planned.stages_of(rank):
        stage = planned.stages[number]
        runs[number] = [_Run(planned, parts, stage=stage, counter=counter) for parts in stage.parts]
    actions = _order(planned, rank)
    last = {(each.kind, each.stage): i for i, each in enumerate(actions)}
    seen: set[tuple[str, int]] = set()
    for i, action in enumerate(actions):
        key = action.kind, action.stage
        step.run(action, runs[action.stage], is_first=key not in seen, is_last=last[key] == i)
        seen.add(key)
    step.update()
    return Peak(rank, dict(step.peak))


def _order(planned: PlannedLayout, rank: int) -> Sequence[Action]:
    """Return the order of a rank, with enough micro-batches to reach its peak."""
    pipeline = planned.pipeline
    if pipeline.ranks == 1:
        count = min(planned.micro_batches, 3)
        return [Action(kind, 0, i) for i in range(count) for kind in ("F", "B")]
    return planned.model.orders(shortened(pipeline))[rank]


def shortened(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with as few micro-batches as still fill it."""
    enough = pipeline.ranks * 2 * (pipeline.per_rank + 1)
    if pipeline.schedule == "gpipe" or pipeline.micro_batches <= enough:
        return pipeline
    # interleaved schedules need a multiple of the ranks
    return Pipeline(pipeline.schedule, pipeline.ranks, pipeline.per_rank, micro_batches=enough)


class _Step:
    """The memory of a rank during a step."""

    def __init__(self, planned: PlannedLayout, rank: int) -> None:
        self.planned = planned
        held = sum(planned.held(unit) for unit in planned.units_of(rank)) * planned.parameter_bytes
        training = planned.config.training
        samples = planned.micro_batches * training.micro_batch_size
        ids = samples * (_WHOLE_COPIES * training.seq_length + _CUT_COPIES * planned.length)
        self.now: Counter[str] = Counter(parameters=held, optimizer=2 * held, batch=_ID_BYTES * ids)
        if planned.layout.pipeline > 1:  # torch receives each micro-batch into a buffer of its own
            received = neighbors(planned, rank) * planned.micro_batches * hidden_bytes(planned)
            self.now["activations"] += received
        self.peak = Counter(self.now)
        self._highest = self.now.total()

    def run(self, action: Action, runs: Sequence[_Run], *, is_first: bool, is_last: bool) -> None:
        """Run an action, the first or the last of its kind for its stage or one in between."""
        if action.kind == "F":
            for run in runs:
                self._forward(run, is_first=is_first)
            return
        for run in reversed(runs):
            self._backward(run, action.kind, is_first=is_first, is_last=is_last)
        if action.kind == "W":  # torch keeps all of a stage until its second half is done
            for run in runs:
                self.now["activations"] += run.count * (run.counts.backward.kept - run.between_halves)

    def update(self) -> None:
        """Run the optimizer: all gradients exist, and it needs nothing else."""
        self._see(0)

    def _forward(self, run: _Run, *, is_first: bool) -> None:
        temporary = run.counts.forward.peak + (run.gathered if run.reshards else 0)
        if is_first:
            self.now["gathered"] += 0 if run.reshards else run.count * run.gathered
            self.now["copies"] += run.count * run.copies
        self.now["activations"] += (run.count - 1) * run.counts.forward.kept
        self._see(temporary)
        self.now["activations"] += run.counts.forward.kept

    def _backward(self, run: _Run, kind: Kind, *, is_first: bool, is_last: bool) -> None:
        kept = {"B": run.counts.backward.kept, "I": run.between_halves, "W": 0}[kind]
        # autograd adds the head's gradient of a tied embedding and that of the lookup into a third tensor
        temporary = 0 if kind == "W" else run.counts.backward.peak + max(0, -run.pending)
        if not (is_first or is_last) and kept <= 0:  # the first of the parts sees the highest
            self._see(temporary)
            self.now["activations"] += run.count * kept
            self.now["gradients"] += run.pending
            return
        for _ in range(run.count):
            self._see(temporary)
            self.now["activations"] += kept
            if kind != "I":
                self._gradients(run, is_first=is_first, is_last=is_last)
        self.now["gradients"] += run.pending

    def _gradients(self, run: _Run, *, is_first: bool, is_last: bool) -> None:
        if run.reshards:
            self.now["gradients"] += run.reduced if is_first else 0
            self._see(run.gathered + run.gradient + run.buffer)
            return
        if is_first:
            self.now["gradients"] += run.gradient
        if is_last and run.is_sharded:
            self.now["gradients"] += run.reduced
            self._see(run.buffer)
            self.now["gradients"] -= run.gradient
            self.now["gathered"] -= run.gathered

    def _see(self, temporary: int) -> None:
        total = self.now.total() + temporary
        if total > self._highest:
            self._highest = total
            self.peak = self.now + Counter(temporary=temporary)
