"""Runners of the micro-batches of a step, through the whole model or through the stages of a pipeline.

The schedules are those of torch.distributed.pipelining.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megatron_tf.config import PipelineSchedule
from megatron_tf.parallel.data_parallel import EachMicroBatch, set_gradient_sync
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.schedules import SCHEDULES, Schedule, make_evaluation, make_schedule
from megatron_tf.parallel.stages import stages_of_rank
from megatron_tf.tokenformer.dtypes import wide_dtype


@dataclass(frozen=True)
class MicroBatchShapes:
    """Shapes of a micro-batch, the same throughout a run."""

    tokens: tuple[int, ...]
    """Ids entering the first stage: (B, S), without the tokens of other context-parallel ranks."""
    hidden: tuple[int, ...]
    """Hidden states between stages: (s, B, D)."""
    dtype: torch.dtype
    """Dtype of hidden states."""


@dataclass(frozen=True)
class MicroBatches:
    """The `count` micro-batches of one step, each of B samples of S tokens; every rank but context-parallel ones, which
    have S tokens each, receives all of it."""

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
    """Runs the micro-batches of one step through this rank's stages.

    The module of the last stage takes `targets` [B, S] and `divisor`, and returns the summed loss over the divisor.
    """

    def train(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        """Run forward and backward, and return the summed loss of all targets over `divisor`.

        Returns None on all ranks but that of the last stage. Gradients are those of that loss, averaged over the
        data-parallel replicas.
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
    """Runs this rank's stages of a pipeline under a schedule of torch.distributed.pipelining."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        shapes: MicroBatchShapes,
        mesh: Mesh,
        schedule: PipelineSchedule,
        reshard: bool,
    ) -> None:
        self.shapes = shapes
        self.mesh = mesh
        self.schedule: PipelineSchedule = schedule
        ranks = mesh.size("pp")
        self.num_stages = ranks * len(modules)
        stages = stages_of_rank(mesh.rank("pp"), ranks=ranks, per_rank=len(modules), is_v=SCHEDULES[schedule].is_v)
        run = [EachMicroBatch(module) for module in modules] if reshard else modules
        self.modules: dict[int, nn.Module] = dict(zip(stages, run, strict=True))
        self.has_first = 0 in self.modules
        self.has_last = self.num_stages - 1 in self.modules
        self._made: dict[str, tuple[int, Schedule]] = {}

    def train(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        return self._run(self._schedule("train", make_schedule, len(batches.inputs)).step, batches, divisor)

    @torch.no_grad()
    def evaluate(self, batches: MicroBatches, divisor: float) -> Tensor | None:
        return self._run(self._schedule("evaluate", make_evaluation, len(batches.inputs)).eval, batches, divisor)

    def _run(self, run: Callable[..., Any], batches: MicroBatches, divisor: float) -> Tensor | None:
        losses: list[Tensor] = []
        # the schedule takes whole batches and splits dimension 0 into `count` equal parts itself
        inputs = (batches.inputs.flatten(0, 1),) if self.has_first else ()
        options: dict[str, Any] = {name: option.flatten(0, 1) for name, option in batches.options().items()}
        target = batches.targets.flatten(0, 1) if self.has_last else None
        if self.has_last:  # other stages of this rank ignore them
            options |= {"targets": target, "divisor": divisor}
        run(*inputs, target=target, losses=losses, return_outputs=False, **options)
        return torch.stack([loss.detach() for loss in losses]).sum() if self.has_last else None

    def _schedule(self, purpose: str, make: Callable[..., Schedule], count: int) -> Schedule:
        """Return the schedule of `count` micro-batches; only the latest is cached, because of its buffers."""
        # the count changes while the batch size ramps up; training and evaluation alternate, so each keeps its own
        if purpose not in self._made or self._made[purpose][0] != count:
            self._made[purpose] = count, make(self.schedule, self._torch_stages(), count)
        return self._made[purpose][1]

    def _torch_stages(self) -> list[PipelineStage]:
        shapes, last = self.shapes, self.num_stages - 1
        # no data: given the shapes, stages need not exchange them before the first step
        hidden = torch.empty(shapes.hidden, dtype=shapes.dtype, device="meta", requires_grad=True)
        ids = torch.empty(shapes.tokens, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=wide_dtype(shapes.dtype), device="meta", requires_grad=True)
        return [
            PipelineStage(
                module,
                stage,
                self.num_stages,
                self.mesh.device,
                input_args=(ids if stage == 0 else hidden,),
                output_args=(loss if stage == last else hidden,),
                group=self.mesh.group("pp"),
            )
            for stage, module in self.modules.items()
        ]


def make_runner(
    modules: Sequence[nn.Module],
    *,
    shapes: MicroBatchShapes,
    mesh: Mesh,
    schedule: PipelineSchedule,
    reshard: bool,
) -> Runner:
    """Make the runner of this rank's stages for this mesh.

    With `reshard`, parameters are freed and gradients reduced within each micro-batch.
    """
    if mesh.size("pp") == 1:
        return LocalRunner(modules[0], reshard=reshard)
    return PipelineRunner(modules, shapes=shapes, mesh=mesh, schedule=schedule, reshard=reshard)
