"""Pipeline parallelism: which layers each stage gets, and running micro-batches through the stages.

The schedules are those of torch.distributed.pipelining.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from megatron_tf.parallel.data_parallel import set_gradient_sync
from megatron_tf.parallel.mesh import LayoutError, Mesh

Schedule = Schedule1F1B | ScheduleGPipe
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(output of the last stage, targets [B, S]) -> mean loss of one micro-batch."""


def partition_layers(costs: Sequence[float], first: float, last: float, num_stages: int) -> list[range]:
    """Cut layers of the given costs into contiguous stages, at least a layer each, so that the dearest is cheapest.

    `first` and `last` are the costs of the embedding and of the output layer. Raises LayoutError for more stages than
    layers.
    """
    layers = len(costs)
    if num_stages > layers:
        raise LayoutError(f"{num_stages} pipeline stages for {layers} layer(s): every stage needs a layer")
    # best[i] = (cost of the dearest stage, cuts) for layers [0, i) in as many stages as rounds have passed
    best = {0: (0.0, [0])}
    for stage in range(num_stages):
        best = {
            stop: min(
                _extend(best[start], start, stop, stage, costs, first, last, num_stages)
                for start in best
                if start < stop
            )
            for stop in range(stage + 1, layers + 1)
        }
    cuts = best[layers][1]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts)]


def _extend(
    so_far: tuple[float, list[int]],
    start: int,
    stop: int,
    stage: int,
    costs: Sequence[float],
    first: float,
    last: float,
    num_stages: int,
) -> tuple[float, list[int]]:
    cost = sum(costs[start:stop]) + (first if stage == 0 else 0.0) + (last if stage == num_stages - 1 else 0.0)
    return max(so_far[0], cost), [*so_far[1], stop]


@dataclass(frozen=True)
class MicroBatches:
    """Shapes of one micro-batch: all of a run are alike."""

    token_shape: tuple[int, ...]
    """Ids entering the first stage: (B, S)."""
    hidden_shape: tuple[int, ...]
    """Hidden states between stages: (s, B, D)."""
    output_shape: tuple[int, ...]
    """What leaves the last stage: (S, B, V / R)."""
    dtype: torch.dtype
    """Type of hidden states and outputs."""


class Runner(Protocol):
    """Runs the micro-batches of one step, as many as there are, through this rank's stage."""

    def train(self, inputs: Tensor, targets: Tensor, options: dict[str, Any], loss_scale: float = 1.0) -> Tensor | None:
        """Forward and backward of ids [count * B, S]: mean loss on the last stage, None elsewhere.

        Gradients are those of `loss_scale` times that mean. `options`, tensors [count * B, ...], are given to every
        stage's module by name.
        """

    def evaluate(self, inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor | None:
        """Forward alone; the same result."""


class LocalRunner:
    """The whole model on one stage: micro-batches one after the other."""

    def __init__(self, module: nn.Module, loss_function: LossFunction, micro_batches: MicroBatches) -> None:
        self.module = module
        self.loss_function = loss_function
        self.size = micro_batches.token_shape[0]

    def train(self, inputs: Tensor, targets: Tensor, options: dict[str, Any], loss_scale: float = 1.0) -> Tensor:
        """See Runner."""
        losses, count = [], len(inputs) // self.size
        for i, (ids, labels, extra) in enumerate(self._micro_batches(inputs, targets, options)):
            set_gradient_sync(self.module, i == count - 1)
            loss = self.loss_function(self.module(ids, **extra), labels) / count
            (loss * loss_scale).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        """See Runner."""
        micro_batches, count = self._micro_batches(inputs, targets, options), len(inputs) // self.size
        losses = [self.loss_function(self.module(ids, **extra), labels) / count for ids, labels, extra in micro_batches]
        return torch.stack(losses).sum()

    def _micro_batches(
        self, inputs: Tensor, targets: Tensor, options: dict[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        split = {name: option.split(self.size) for name, option in options.items()}
        for i, (ids, labels) in enumerate(zip(inputs.split(self.size), targets.split(self.size), strict=True)):
            yield ids, labels, {name: parts[i] for name, parts in split.items()}


class PipelineRunner:
    """One stage of several, under a schedule of torch.distributed.pipelining; evaluation is under GPipe."""

    def __init__(
        self,
        module: nn.Module,
        loss_function: LossFunction,
        micro_batches: MicroBatches,
        mesh: Mesh,
        schedule: Literal["1f1b", "gpipe"],
    ) -> None:
        self.module = module
        self.loss_function = loss_function
        self.micro_batches = micro_batches
        self.mesh = mesh
        self.kind: type[Schedule] = Schedule1F1B if schedule == "1f1b" else ScheduleGPipe
        self.is_first = mesh.rank("pp") == 0
        self.is_last = mesh.rank("pp") == mesh.size("pp") - 1
        self._loss_scale = 1.0
        self._made: dict[str, tuple[int, Schedule]] = {}

    def train(self, inputs: Tensor, targets: Tensor, options: dict[str, Any], loss_scale: float = 1.0) -> Tensor | None:
        """See Runner."""
        self._loss_scale = loss_scale
        loss = self._run(self._schedule("train", self.kind, inputs).step, inputs, targets, options)
        return None if loss is None else loss / loss_scale

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor | None:
        """See Runner."""
        self._loss_scale = 1.0
        return self._run(self._schedule("evaluate", ScheduleGPipe, inputs).eval, inputs, targets, options)

    def _run(self, run: Callable[..., Any], inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor | None:
        losses: list[Tensor] = []
        target = targets if self.is_last else None
        run(*((inputs,) if self.is_first else ()), target=target, losses=losses, return_outputs=False, **options)
        return torch.stack([loss.detach() for loss in losses]).sum() if self.is_last else None

    def _schedule(self, purpose: str, kind: type[Schedule], inputs: Tensor) -> Schedule:
        """The schedule of as many micro-batches as these are; only the last one is kept, for what it has allocated."""
        count = len(inputs) // self.micro_batches.token_shape[0]
        if purpose not in self._made or self._made[purpose][0] != count:
            self._made[purpose] = count, self._make(kind, count)
        return self._made[purpose][1]

    def _make(self, kind: type[Schedule], count: int) -> Schedule:
        rank, stages, shapes = self.mesh.rank("pp"), self.mesh.size("pp"), self.micro_batches
        hidden = torch.empty(shapes.hidden_shape, dtype=shapes.dtype, device="meta", requires_grad=True)
        ids = torch.empty(shapes.token_shape, dtype=torch.int64, device="meta")
        output = torch.empty(shapes.output_shape, dtype=shapes.dtype, device="meta", requires_grad=True)
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
            return self.loss_function(output, targets) / count * self._loss_scale

        return kind(stage, count, loss_fn=loss_function, scale_grads=False)


def make_runner(
    module: nn.Module,
    loss_function: LossFunction,
    micro_batches: MicroBatches,
    mesh: Mesh,
    schedule: Literal["1f1b", "gpipe"],
) -> Runner:
    """The runner for this mesh; 1f1b needs at least as many micro-batches as there are stages."""
    if mesh.size("pp") == 1:
        return LocalRunner(module, loss_function, micro_batches)
    return PipelineRunner(module, loss_function, micro_batches, mesh, schedule)
