"""One optimizer step, and one evaluation, on any layout."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What a step measured; the same on every rank."""

    loss: float
    """Mean over the tokens of the global batch, before the update."""
    grad_norm: float
    """Global L2 norm before clipping."""


def train_step(state: TrainState, batch: Tensor, lr: float) -> StepResult:
    """Forward, backward and update on this replica's part of the batch: ids [count, B, S + 1]."""
    inputs, targets = inputs_and_targets(state.mesh, batch)
    loss = state.runner.train(inputs, targets)
    grad_norm = state.optimizer.step(lr)
    return StepResult(mean_loss(loss, state.mesh), grad_norm)


def evaluation_loss(state: TrainState, batch: Tensor) -> float:
    """Mean loss over the tokens of a global batch, of which `batch` [count, B, S + 1] is this replica's part."""
    inputs, targets = inputs_and_targets(state.mesh, batch)
    return mean_loss(state.runner.evaluate(inputs, targets), state.mesh)


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


def inputs_and_targets(mesh: Mesh, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [count, B, S + 1] -> those to read and those to predict, each [count * B, S], on the rank's device."""
    ids = batch.to(mesh.device).flatten(0, 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
