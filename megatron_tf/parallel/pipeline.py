"""Pipeline parallelism: which layers each stage gets, and running micro-batches through the stages.

The schedules are those of torch.distributed.pipelining.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from megatron_tf.parallel.data_parallel import set_gradient_sync
from megatron_tf.parallel.mesh import LayoutError, Mesh

Schedule = Schedule1F1B | ScheduleGPipe
LossFunction = Callable[[Tensor, Tensor, float], Tensor]
"""(output of the last stage, targets [B, S], divisor) -> sum of the targets' losses over the divisor."""


def partition_layers(costs: Sequence[float], num_stages: int) -> list[range]:
    """Cut layers of the given costs into contiguous stages, at least a layer each, so that the dearest is cheapest.

    Raises LayoutError for more stages than layers.
    """
    layers = len(costs)
    if num_stages > layers:
        raise LayoutError(f"{num_stages} pipeline stages for {layers} layer(s): every stage needs a layer")
    # best[i] = (cost of the dearest stage, cuts) for layers [0, i) in as many stages as rounds have passed
    best = {0: (0.0, [0])}
    for stage in range(num_stages):
        following = {}
        for stop in range(stage + 1, layers + 1):
            cuts = [
                (max(dearest, sum(costs[start:stop])), [*starts, stop])
                for start, (dearest, starts) in best.items()
                if start < stop
            ]
            # by cost, then by cuts: every rank has to find the same ones where several cost the same
            following[stop] = min(cuts)
        best = following
    return [range(start, stop) for start, stop in itertools.pairwise(best[layers][1])]


@dataclass(frozen=True)
class MicroBatchShapes:
    """Shapes of one micro-batch: all of a run are alike."""

    tokens: tuple[int, ...]
    """Ids entering the first stage: (B, S)."""
    hidden: tuple[int, ...]
    """Hidden states between stages: (s, B, D)."""
    output: tuple[int, ...]
    """What leaves the last stage: (S, B, V / R)."""
    dtype: torch.dtype
    """Type of hidden states and outputs."""


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one step, `count` of B samples of S tokens; every stage is given all of this."""

    inputs: Tensor
    """Ids to read, on the device: [count, B, S]."""
    targets: Tensor
    """Ids to predict, on the device: [count, B, S]."""
    document_starts: Tensor | None = None
    """Where each token's document begins, on the host: [count, B, S]."""
    sample_numbers: Tensor | None = None
    """The samples' positions in the data, on the host: [count, B]."""

    def options(self) -> dict[str, Tensor]:
        """What the module takes by name, [count, B, ...] each."""
        both = {"document_starts": self.document_starts, "sample_numbers": self.sample_numbers}
        return {name: option for name, option in both.items() if option is not None}


class Runner(Protocol):
    """Runs the micro-batches of one step, as many as there are, through this rank's stage."""

    def train(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        """Forward and backward: the sum of all targets' losses over `divisor` on the last stage, None elsewhere.

        Gradients are those of that sum, averaged over the data-parallel replicas.
        """

    def evaluate(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        """Forward alone; the same result."""


class LocalRunner:
    """The whole model on one stage: micro-batches one after the other."""

    def __init__(self, module: nn.Module, loss_function: LossFunction) -> None:
        self.module = module
        self.loss_function = loss_function

    def train(self, batches: MicroBatches, divisor: float) -> Tensor:
        """See Runner."""
        losses = []
        last = len(batches.inputs) - 1
        for i in range(len(batches.inputs)):
            # gradients add up on each replica, and are communicated once
            set_gradient_sync(self.module, i == last)
            loss = self._loss(batches, i, divisor)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, batches: MicroBatches, divisor: float) -> Tensor:
        """See Runner."""
        return torch.stack([self._loss(batches, i, divisor) for i in range(len(batches.inputs))]).sum()

    def _loss(self, batches: MicroBatches, i: int, divisor: float) -> Tensor:
        options = {name: option[i] for name, option in batches.options().items()}
        return self.loss_function(self.module(batches.inputs[i], **options), batches.targets[i], divisor)


class PipelineRunner:
    """One stage of several, under a schedule of torch.distributed.pipelining; evaluation is under GPipe."""

    def __init__(
        self,
        module: nn.Module,
        loss_function: LossFunction,
        *,
        shapes: MicroBatchShapes,
        mesh: Mesh,
        schedule: Literal["1f1b", "gpipe"],
    ) -> None:
        self.module = module
        self.loss_function = loss_function
        self.shapes = shapes
        self.mesh = mesh
        self.schedule_class: type[Schedule] = Schedule1F1B if schedule == "1f1b" else ScheduleGPipe
        self.is_first = mesh.rank("pp") == 0
        self.is_last = mesh.rank("pp") == mesh.size("pp") - 1
        self._divisor = 1.0
        self._made: dict[str, tuple[int, Schedule]] = {}

    def train(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        """See Runner."""
        return self._run(self._schedule("train", self.schedule_class, len(batches.inputs)).step, batches, divisor)

    @torch.no_grad()
    def evaluate(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        """See Runner."""
        return self._run(self._schedule("evaluate", ScheduleGPipe, len(batches.inputs)).eval, batches, divisor)

    def _run(self, run: Callable[..., Any], batches: MicroBatches, divisor: float) -> Tensor | None:
        self._divisor = divisor
        losses: list[Tensor] = []
        # the schedule takes whole batches and cuts them itself, into `count` equal parts of dimension 0
        inputs = (batches.inputs.flatten(0, 1),) if self.is_first else ()
        target = batches.targets.flatten(0, 1) if self.is_last else None
        options = {name: option.flatten(0, 1) for name, option in batches.options().items()}
        run(*inputs, target=target, losses=losses, return_outputs=False, **options)
        return torch.stack([loss.detach() for loss in losses]).sum() if self.is_last else None

    def _schedule(self, purpose: str, schedule_class: type[Schedule], count: int) -> Schedule:
        """The schedule of `count` micro-batches; only the last one is kept, for what it has allocated."""
        # the count changes while the batch size ramps up; training and evaluation alternate, so each keeps its own
        if purpose not in self._made or self._made[purpose][0] != count:
            self._made[purpose] = count, self._make(schedule_class, count)
        return self._made[purpose][1]

    def _make(self, schedule_class: type[Schedule], count: int) -> Schedule:
        rank, stages = self.mesh.rank("pp"), self.mesh.size("pp")
        shapes = self.shapes
        # without data: told the shapes, stages need not exchange them before the first step
        hidden = torch.empty(shapes.hidden, dtype=shapes.dtype, device="meta", requires_grad=True)
        ids = torch.empty(shapes.tokens, dtype=torch.int64, device="meta")
        output = torch.empty(shapes.output, dtype=shapes.dtype, device="meta", requires_grad=True)
        stage = PipelineStage(
            self.module,
            rank,
            stages,
            self.mesh.device,
            input_args=(ids if rank == 0 else hidden,),
            output_args=(output if rank == stages - 1 else hidden,),
            group=self.mesh.group("pp"),
        )

        def loss_function(output: Tensor, targets: Tensor) -> Tensor:
            return self.loss_function(output, targets, self._divisor)

        # the loss function has divided already: the schedule must not divide gradients by `count`
        return schedule_class(stage, count, loss_fn=loss_function, scale_grads=False)


def make_runner(
    module: nn.Module,
    loss_function: LossFunction,
    *,
    shapes: MicroBatchShapes,
    mesh: Mesh,
    schedule: Literal["1f1b", "gpipe"],
) -> Runner:
    """Make the runner for this mesh; 1f1b needs at least as many micro-batches as there are stages."""
    if mesh.size("pp") == 1:
        return LocalRunner(module, loss_function)
    return PipelineRunner(module, loss_function, shapes=shapes, mesh=mesh, schedule=schedule)
