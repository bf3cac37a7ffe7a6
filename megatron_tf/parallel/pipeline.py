"""Pipeline parallelism: the partition of layers into stages, and the runners of micro-batches through them.

The schedules are those of torch.distributed.pipelining.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from megatron_tf.parallel.data_parallel import EachMicroBatch, set_gradient_sync
from megatron_tf.parallel.mesh import LayoutError, Mesh
from megatron_tf.tokenformer.dtypes import wide_dtype

Schedule = Schedule1F1B | ScheduleGPipe


def partition_layers(costs: Sequence[float], num_stages: int) -> list[range]:
    """Partition layers into contiguous, non-empty stages that minimize the cost of the most expensive stage.

    Raises LayoutError if there are more stages than layers.
    """
    layers = len(costs)
    if num_stages > layers:
        raise LayoutError(f"{num_stages} pipeline stages for {layers} layer(s): every stage needs a layer")
    # best[i] = (cost of the most expensive stage, cuts) of layers [0, i) in as many stages as iterations so far
    best = {0: (0.0, [0])}
    for stage in range(num_stages):
        following = {}
        for stop in range(stage + 1, layers + 1):
            cuts = [
                (max(highest, sum(costs[start:stop])), [*starts, stop])
                for start, (highest, starts) in best.items()
                if start < stop
            ]
            # by cost, then by cuts: every rank has to break ties in the same way
            following[stop] = min(cuts)
        best = following
    return [range(start, stop) for start, stop in itertools.pairwise(best[layers][1])]


@dataclass(frozen=True)
class MicroBatchShapes:
    """Shapes of a micro-batch, the same throughout a run."""

    tokens: tuple[int, ...]
    """Ids entering the first stage: (B, S)."""
    hidden: tuple[int, ...]
    """Hidden states between stages: (s, B, D)."""
    dtype: torch.dtype
    """Dtype of hidden states."""


@dataclass(frozen=True)
class MicroBatches:
    """The `count` micro-batches of one step, each of B samples of S tokens; every stage receives all of it."""

    inputs: Tensor
    """Input ids, on the device: [count, B, S]."""
    targets: Tensor
    """Target ids, on the device: [count, B, S]."""
    document_starts: Tensor | None = None
    """Index at which each token's document starts, on the device: [count, B, S]."""
    document_lengths: Tensor | None = None
    """Lengths of each sample's documents, padded with zeros: [count, B, M], on the host or the device as the layers
    need."""
    sample_numbers: Tensor | None = None
    """The samples' positions in the data, on the device: [count, B]."""

    def options(self) -> dict[str, Tensor]:
        """Return the keyword arguments of the module, each [count, B, ...]."""
        options = {
            "document_starts": self.document_starts,
            "document_lengths": self.document_lengths,
            "sample_numbers": self.sample_numbers,
        }
        return {name: option for name, option in options.items() if option is not None}


class Runner(Protocol):
    """Runs the micro-batches of one step through this rank's stage.

    The module of the last stage takes `targets` [B, S] and `divisor`, and returns the summed loss over the divisor.
    """

    def train(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        """Run forward and backward, and return the summed loss of all targets over `divisor`.

        Returns None on all but the last stage. Gradients are those of that loss, averaged over the data-parallel
        replicas.
        """

    def evaluate(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        """Run forward only, and return the same as `train`."""


class LocalRunner:
    """Runs micro-batches one after the other through a model without pipeline stages."""

    def __init__(self, module: nn.Module, *, reshard: bool) -> None:
        self.module = module
        self.reshard = reshard

    def train(self, batches: MicroBatches, divisor: float) -> Tensor:
        losses = []
        last = len(batches.inputs) - 1
        for i in range(len(batches.inputs)):
            # gradients accumulate on each replica and are reduced once, unless that takes too much memory
            set_gradient_sync(self.module, self.reshard or i == last)
            loss = self._loss(batches, i, divisor)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, batches: MicroBatches, divisor: float) -> Tensor:
        return torch.stack([self._loss(batches, i, divisor) for i in range(len(batches.inputs))]).sum()

    def _loss(self, batches: MicroBatches, i: int, divisor: float) -> Tensor:
        options = {name: option[i] for name, option in batches.options().items()}
        loss: Tensor = self.module(batches.inputs[i], targets=batches.targets[i], divisor=divisor, **options)
        return loss


class PipelineRunner:
    """Runs one of several stages under a schedule of torch.distributed.pipelining; evaluation always uses GPipe."""

    def __init__(
        self,
        module: nn.Module,
        *,
        shapes: MicroBatchShapes,
        mesh: Mesh,
        schedule: Literal["1f1b", "gpipe"],
        reshard: bool,
    ) -> None:
        self.module = EachMicroBatch(module) if reshard else module
        self.shapes = shapes
        self.mesh = mesh
        self.schedule_class: type[Schedule] = Schedule1F1B if schedule == "1f1b" else ScheduleGPipe
        self.is_first = mesh.rank("pp") == 0
        self.is_last = mesh.rank("pp") == mesh.size("pp") - 1
        self._made: dict[str, tuple[int, Schedule]] = {}

    def train(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        return self._run(self._schedule("train", self.schedule_class, len(batches.inputs)).step, batches, divisor)

    @torch.no_grad()
    def evaluate(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        return self._run(self._schedule("evaluate", ScheduleGPipe, len(batches.inputs)).eval, batches, divisor)

    def _run(self, run: Callable[..., Any], batches: MicroBatches, divisor: float) -> Tensor | None:
        losses: list[Tensor] = []
        # the schedule takes whole batches and splits dimension 0 into `count` equal parts itself
        inputs = (batches.inputs.flatten(0, 1),) if self.is_first else ()
        options: dict[str, Any] = {name: option.flatten(0, 1) for name, option in batches.options().items()}
        target = batches.targets.flatten(0, 1) if self.is_last else None
        if self.is_last:
            options |= {"targets": target, "divisor": divisor}
        run(*inputs, target=target, losses=losses, return_outputs=False, **options)
        return torch.stack([loss.detach() for loss in losses]).sum() if self.is_last else None

    def _schedule(self, purpose: str, schedule_class: type[Schedule], count: int) -> Schedule:
        """Return the schedule of `count` micro-batches; only the latest is cached, because of its buffers."""
        # the count changes while the batch size ramps up; training and evaluation alternate, so each keeps its own
        if purpose not in self._made or self._made[purpose][0] != count:
            self._made[purpose] = count, self._make(schedule_class, count)
        return self._made[purpose][1]

    def _make(self, schedule_class: type[Schedule], count: int) -> Schedule:
        rank, stages = self.mesh.rank("pp"), self.mesh.size("pp")
        shapes = self.shapes
        # no data: given the shapes, stages need not exchange them before the first step
        hidden = torch.empty(shapes.hidden, dtype=shapes.dtype, device="meta", requires_grad=True)
        ids = torch.empty(shapes.tokens, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=wide_dtype(shapes.dtype), device="meta", requires_grad=True)
        stage = PipelineStage(
            self.module,
            rank,
            stages,
            self.mesh.device,
            input_args=(ids if rank == 0 else hidden,),
            output_args=(loss if rank == stages - 1 else hidden,),
            group=self.mesh.group("pp"),
        )
        # the loss is divided already, so the schedule must not divide gradients by `count`
        return schedule_class(stage, count, loss_fn=lambda loss, _: loss, scale_grads=False)


def make_runner(
    module: nn.Module,
    *,
    shapes: MicroBatchShapes,
    mesh: Mesh,
    schedule: Literal["1f1b", "gpipe"],
    reshard: bool,
) -> Runner:
    """Make the runner for this mesh; 1f1b requires at least as many micro-batches as stages.

    With `reshard`, parameters are freed and gradients reduced within each micro-batch.
    """
    if mesh.size("pp") == 1:
        return LocalRunner(module, reshard=reshard)
    return PipelineRunner(module, shapes=shapes, mesh=mesh, schedule=schedule, reshard=reshard)
