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
from megatron_tf.parallel.mesh import Mesh

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(output of the last stage, targets [B, S]) -> loss of one micro-batch, already divided by their number."""


def partition_layers(costs: Sequence[float], first: float, last: float, num_stages: int) -> list[range]:
    """Cut layers of the given costs into contiguous stages, at least a layer each, so that the dearest is cheapest.

    `first` and `last` are the costs of the embedding and of the output layer. Raises ValueError for more stages than
    layers.
    """
    layers = len(costs)
    if num_stages > layers:
        raise ValueError(f"{num_stages} pipeline stages for {layers} layer(s): every stage needs a layer")
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

    count: int
    """Micro-batches of one optimizer step on each replica."""
    token_shape: tuple[int, ...]
    """Ids entering the first stage: (B, S)."""
    hidden_shape: tuple[int, ...]
    """Hidden states between stages: (s, B, D)."""
    output_shape: tuple[int, ...]
    """What leaves the last stage: (S, B, V / R)."""
    dtype: torch.dtype
    """Type of hidden states and outputs."""


class Runner(Protocol):
    """Runs the micro-batches of one step through this rank's stage."""

    def train(self, inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor | None:
        """Forward and backward of ids [count * B, S]: mean loss on the last stage, None elsewhere.

        `options`, tensors [count * B, ...], are given to every stage's module by name.
        """

    def evaluate(self, inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor | None:
        """Forward alone; the same result."""


class LocalRunner:
    """The whole model on one stage: micro-batches one after the other."""

    def __init__(self, module: nn.Module, loss_function: LossFunction, micro_batches: MicroBatches) -> None:
        self.module = module
        self.loss_function = loss_function
        self.count = micro_batches.count

    def train(self, inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        """See Runner."""
        losses = []
        for i, (ids, labels, extra) in enumerate(self._micro_batches(inputs, targets, options)):
            set_gradient_sync(self.module, i == self.count - 1)
            loss = self.loss_function(self.module(ids, **extra), labels)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        """See Runner."""
        micro_batches = self._micro_batches(inputs, targets, options)
        losses = [self.loss_function(self.module(ids, **extra), labels) for ids, labels, extra in micro_batches]
        return torch.stack(losses).sum()

    def _micro_batches(
        self, inputs: Tensor, targets: Tensor, options: dict[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        chunked = {name: option.chunk(self.count) for name, option in options.items()}
        for i, (ids, labels) in enumerate(zip(inputs.chunk(self.count), targets.chunk(self.count), strict=True)):
            yield ids, labels, {name: chunks[i] for name, chunks in chunked.items()}


class PipelineRunner:
    """One stage of several, under a schedule of torch.distributed.pipelining."""

    def __init__(
        self,
        module: nn.Module,
        loss_function: LossFunction,
        micro_batches: MicroBatches,
        mesh: Mesh,
        schedule: Literal["1f1b", "gpipe"],
    ) -> None:
        kind: type[Schedule1F1B | ScheduleGPipe] = Schedule1F1B if schedule == "1f1b" else ScheduleGPipe
        self.schedule = self._make(kind, module, loss_function, micro_batches, mesh)
        self.evaluation = self._make(ScheduleGPipe, module, loss_function, micro_batches, mesh)
        self.is_first = mesh.rank("pp") == 0
        self.is_last = mesh.rank("pp") == mesh.size("pp") - 1

    @staticmethod
    def _make(
        kind: type[Schedule1F1B | ScheduleGPipe],
        module: nn.Module,
        loss_function: LossFunction,
        micro_batches: MicroBatches,
        mesh: Mesh,
    ) -> Schedule1F1B | ScheduleGPipe:
        rank, stages = mesh.rank("pp"), mesh.size("pp")
        hidden = torch.empty(micro_batches.hidden_shape, dtype=micro_batches.dtype, device="meta", requires_grad=True)
        ids = torch.empty(micro_batches.token_shape, dtype=torch.int64, device="meta")
        output = torch.empty(micro_batches.output_shape, dtype=micro_batches.dtype, device="meta", requires_grad=True)
        stage = PipelineStage(
            module,
            rank,
            stages,
            mesh.device,
            input_args=(ids if rank == 0 else hidden,),
            output_args=(output if rank == stages - 1 else hidden,),
            group=mesh.group("pp"),
        )
        return kind(stage, micro_batches.count, loss_fn=loss_function, scale_grads=False)

    def train(self, inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor | None:
        """See Runner."""
        losses: list[Tensor] = []
        self.schedule.step(
            *((inputs,) if self.is_first else ()),
            target=targets if self.is_last else None,
            losses=losses,
            return_outputs=False,
            **options,
        )
        return torch.stack([loss.detach() for loss in losses]).sum() if self.is_last else None

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor | None:
        """See Runner."""
        losses: list[Tensor] = []
        self.evaluation.eval(
            *((inputs,) if self.is_first else ()),
            target=targets if self.is_last else None,
            losses=losses,
            return_outputs=False,
            **options,
        )
        return torch.stack(losses).sum() if self.is_last else None


def make_runner(
    module: nn.Module,
    loss_function: LossFunction,
    micro_batches: MicroBatches,
    mesh: Mesh,
    schedule: Literal["1f1b", "gpipe"],
) -> Runner:
    """The runner for this mesh. Raises ValueError where a schedule needs more micro-batches than there are."""
    if mesh.size("pp") == 1:
        return LocalRunner(module, loss_function, micro_batches)
    if schedule == "1f1b" and micro_batches.count < mesh.size("pp"):
        raise ValueError(
            f"the 1f1b schedule over {mesh.size('pp')} stages needs at least as many micro-batches, got "
            f"{micro_batches.count}: raise global_batch_size, lower micro_batch_size, or choose gpipe"
        )
    return PipelineRunner(module, loss_function, micro_batches, mesh, schedule)
