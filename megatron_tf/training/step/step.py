"""One optimizer step, and one evaluation, on any layout."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.data.loader import sample_numbers
from megatron_tf.layers.boundaries import document_starts, mask_targets_after_eod
from megatron_tf.layers.cross_entropy import IGNORE_INDEX
from megatron_tf.parallel.mesh import Mesh
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
    """What was not finite, "loss" or parameters, and the first rank where. Nothing was updated then. A batch with an id
    that the vocabulary has not has such a loss."""
    is_overflow: bool = False
    """Whether that was because of a loss scale that could be lowered, rather than of the batch."""


def train_step(state: TrainState, batch: Tensor, lr: float, consumed_samples: int = 0) -> StepResult:
    """Forward, backward and update on this replica's part of the batch: ids [count, B, S + 1].

    What is dropped follows from `consumed_samples`, the position of the global batch in the data.
    """
    inputs, targets, options = prepare(state, batch)
    if state.model.dropout is not None:
        count, size, _ = batch.shape
        replica, replicas = state.mesh.rank("dp"), state.mesh.size("dp")
        numbers = sample_numbers(consumed_samples, count * size * replicas, size, replica, replicas)
        options["sample_numbers"] = torch.from_numpy(numbers).flatten()
    loss_scale = state.scaler.scale
    loss = _unless_bad_ids(state, batch, state.runner.train(inputs, targets, options, loss_scale))
    scale = mask_scale(state, targets)
    value = mean_loss(loss, state.mesh) * scale
    if not math.isfinite(value):
        state.optimizer.discard()
        return StepResult(value, math.nan, nonfinite={"loss": _first_rank_nonfinite(loss, state.mesh)})
    state.timer.enter("optimizer")
    update = state.optimizer.step(lr, scale / loss_scale)
    is_overflow = state.scaler.update(math.isfinite(update.norm))
    return StepResult(value, update.norm, update.norms, update.nonfinite, is_overflow)


def evaluation_loss(state: TrainState, batch: Tensor) -> float:
    """Mean loss over the tokens of a global batch, of which `batch` [count, B, S + 1] is this replica's part; NaN where
    it has an id that the vocabulary has not."""
    inputs, targets, options = prepare(state, batch)
    loss = _unless_bad_ids(state, batch, state.runner.evaluate(inputs, targets, options))
    return mean_loss(loss, state.mesh) * mask_scale(state, targets)


def prepare(state: TrainState, batch: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Ids [count, B, S + 1] -> those to read and those to predict, each [count * B, S], and options of the model."""
    if has_bad_ids(state, batch):
        # some layouts would read rows of nobody; this rank still takes its part in the collectives of the step
        batch = torch.zeros_like(batch)
    ids = batch.to(state.mesh.device).flatten(0, 1)
    inputs, targets, options = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), {}
    masking = state.masking
    if masking.mask_loss:
        targets = mask_targets_after_eod(inputs, targets, masking.eod)
    if masking.reset_attention:
        options["document_starts"] = document_starts(inputs, masking.eod)
    return inputs, targets, options


def has_bad_ids(state: TrainState, batch: Tensor) -> bool:
    """Whether an id of this replica's part of a batch, which is on the host, is not in the vocabulary."""
    lowest, highest = torch.aminmax(batch)
    return int(lowest) < 0 or int(highest) >= state.model.config.vocab_size


def _unless_bad_ids(state: TrainState, batch: Tensor, loss: Tensor | None) -> Tensor | None:
    """The loss, or NaN, which tells all ranks of an id that one of them found."""
    return torch.tensor(math.nan, device=state.mesh.device) if has_bad_ids(state, batch) else loss


def mask_scale(state: TrainState, targets: Tensor) -> float:
    """What makes a mean over all targets of the global batch one over those that are not ignored."""
    if not state.masking.mask_loss:
        return 1.0
    counts = torch.tensor([targets.numel(), int((targets != IGNORE_INDEX).sum())], device=state.mesh.device)
    group = state.mesh.group("dp")
    if group is not None:
        dist.all_reduce(counts, group=group)
    every, counted = counts.tolist()
    return every / max(counted, 1)


def _first_rank_nonfinite(loss: Tensor | None, mesh: Mesh) -> int:
    """The first rank whose own loss is not finite."""
    if mesh.world is None:
        return 0
    is_finite = loss is None or math.isfinite(float(loss))
    first = torch.tensor(mesh.world.size() if is_finite else mesh.world.rank(), device=mesh.device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=mesh.world)
    return int(first)


def mean_loss(loss: Tensor | None, mesh: Mesh) -> float:
    """Mean over replicas of the last stage's loss, made known to every stage; None on the other stages."""
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if loss is not None:
        total += loss
    for axis in ("dp", "pp"):
        group = mesh.group(axis)
        if group is not None:
            dist.all_reduce(total, group=group)
    return float(total) / mesh.size("dp")
