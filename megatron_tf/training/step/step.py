"""One optimizer step, and one evaluation, on any layout."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.data.batch import Batch
from megatron_tf.layers.cross_entropy import IGNORE_INDEX
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.pipeline import MicroBatches
from megatron_tf.training.step.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What a step measured; the same on every rank."""

    loss: float
    """Mean over the tokens of the global batch, before the update."""
    grad_norm: float
    """Global L2 norm before clipping."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """The same by kind of parameter."""
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    """What was non-finite, "loss" or parameters, and the first rank where. Nothing was updated then. A batch with an id
    outside the vocabulary has such a loss."""
    is_overflow: bool = False
    """Whether that was because of a loss scale that could be lowered, rather than of the batch."""


def train_step(state: TrainState, batch: Batch, lr: float) -> StepResult:
    """Forward, backward and update on this replica's part of the global batch."""
    loss_scale = state.scaler.scale
    loss = forward_backward(state, batch)
    value = mean_over_replicas(loss, state.mesh) / loss_scale
    if not math.isfinite(value):
        state.optimizer.discard()
        return StepResult(value, math.nan, nonfinite={"loss": _first_rank_nonfinite(loss, state.mesh)})
    state.timer.enter("optimizer")
    update = state.optimizer.step(lr, 1 / loss_scale)
    is_overflow = state.scaler.update(math.isfinite(update.norm))
    return StepResult(
        loss=value,
        grad_norm=update.norm,
        norms=update.norms,
        nonfinite=update.nonfinite,
        is_overflow=is_overflow,
    )


def forward_backward(state: TrainState, batch: Batch) -> Tensor | None:
    """Fill the gradients, times the loss scale; this replica's loss, times the same, on the last stage."""
    divisor = _loss_divisor(batch, state.mesh) / state.scaler.scale
    sample_numbers = None if state.model.dropout is None else batch.sample_numbers
    loss = state.runner.train(micro_batches(state, batch, sample_numbers), divisor)
    return _unless_bad_ids(state, batch, loss)


def evaluation_loss(state: TrainState, batch: Batch) -> float:
    """Mean loss over the targets of a global batch, of which `batch` is this replica's part; NaN where it has an id
    outside the vocabulary. Nothing is dropped."""
    loss = state.runner.evaluate(micro_batches(state, batch), _loss_divisor(batch, state.mesh))
    return mean_over_replicas(_unless_bad_ids(state, batch, loss), state.mesh)


def micro_batches(state: TrainState, batch: Batch, sample_numbers: Tensor | None = None) -> MicroBatches:
    """Prepare a batch for the stages: ids and targets on the device, the rest on the host."""
    ids = batch.ids
    if has_bad_ids(state, batch):
        # some layouts would read rows of nobody; this rank still takes its part in the collectives of the step
        ids = torch.zeros_like(ids)
    inputs, targets = ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
    if batch.ignored is not None:
        targets = targets.masked_fill(batch.ignored, IGNORE_INDEX)
    device = state.mesh.device
    return MicroBatches(inputs.to(device), targets.to(device), batch.document_starts, sample_numbers)


def has_bad_ids(state: TrainState, batch: Batch) -> bool:
    """Whether an id of this replica's part of a batch is not in the vocabulary."""
    lowest, highest = torch.aminmax(batch.ids)
    return int(lowest) < 0 or int(highest) >= state.model.config.vocab_size


def _unless_bad_ids(state: TrainState, batch: Batch, loss: Tensor | None) -> Tensor | None:
    """The loss, or NaN, which tells all ranks of an id that one of them found."""
    return torch.tensor(math.nan, device=state.mesh.device) if has_bad_ids(state, batch) else loss


def _loss_divisor(batch: Batch, mesh: Mesh) -> float:
    """What each replica divides the sum of its losses by, so that the mean over replicas is one over all targets.

    This is the one place where the loss is normalized: not by micro-batch and not by replica, whose numbers of targets
    differ where some are ignored. Replicas are averaged in the end, gradients by FSDP and the loss by
    `mean_over_replicas`, so each divides by its average share of the targets, as large as if it were alone.
    """
    group = mesh.group("dp")
    if batch.ignored is None or group is None:
        return max(batch.num_targets, 1)  # every replica has as many
    total = all_reduce(torch.tensor(batch.num_targets, device=mesh.device), group)
    return max(int(total), 1) / mesh.size("dp")


def _first_rank_nonfinite(loss: Tensor | None, mesh: Mesh) -> int:
    """Return the first rank whose own loss is non-finite."""
    if mesh.world is None:
        return 0
    is_finite = loss is None or math.isfinite(float(loss))
    first = mesh.world.size() if is_finite else mesh.world.rank()
    return int(all_reduce(torch.tensor(first, device=mesh.device), mesh.world, dist.ReduceOp.MIN))


def mean_over_replicas(loss: Tensor | None, mesh: Mesh) -> float:
    """Mean over replicas of the last stage's loss, made known to every stage; None on the other stages."""
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if loss is not None:
        total += loss
    for axis in ("dp", "pp"):
        total = all_reduce(total, mesh.group(axis))
    return float(total) / mesh.size("dp")
