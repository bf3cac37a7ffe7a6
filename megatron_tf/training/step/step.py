"""One training step, and one evaluation, on any layout."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.data.batch import Batch
from megatron_tf.layers.casting import keeping_casts
from megatron_tf.layers.cross_entropy import IGNORE_INDEX
from megatron_tf.model.row_probes import probe_rows
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.pipeline import MicroBatches
from megatron_tf.training.observability.row_metrics import RowMetrics
from megatron_tf.training.step.row_inspector import RowInspector
from megatron_tf.training.step.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """The measurements of a step, the same on every rank."""

    loss: float
    """Mean over the tokens of the global batch, before the update."""
    grad_norm: float
    """Global L2 norm before clipping."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """The same norm by kind of parameter."""
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    """The first rank with a non-finite value, by "loss" or parameter name; if there is any, nothing was updated. An id
    outside the vocabulary makes the loss non-finite."""
    is_overflow: bool = False
    """Whether non-finite gradients are due to a loss scale that could be lowered, rather than to the batch."""
    rows: Sequence[RowMetrics] = ()
    """Old and new rows, if they were inspected and the step was taken."""


def train_step(state: TrainState, batch: Batch, lr: float, inspector: RowInspector | None = None) -> StepResult:
    """Run forward, backward and the update on this replica's part of the global batch.

    An `inspector` measures the rows, which changes no bit of the training and waits for the device once more.
    """
    loss_scale = state.scaler.scale
    with probe_rows(*state.stages, enabled=inspector is not None) as probes:
        loss = forward_backward(state, batch)
    # queued before the loss is read, which waits for the device: by then the norms are computed, too
    gradients = state.optimizer.take_gradients(1 / loss_scale)
    value = mean_over_replicas(loss, state.mesh) / loss_scale
    if not math.isfinite(value):
        return StepResult(value, math.nan, nonfinite={"loss": _first_rank_nonfinite(loss, state.mesh)})
    state.timer.enter("optimizer")
    before_clipping = None if inspector is None else inspector.gradient_squares(gradients.tensors)
    update = state.optimizer.apply(gradients, lr)
    rows: Sequence[RowMetrics] = ()
    if inspector is not None and before_clipping is not None and not update.nonfinite:
        rows = inspector.measure(probes, before_clipping)
    is_overflow = state.scaler.update(math.isfinite(update.norm))
    return StepResult(
        loss=value,
        grad_norm=update.norm,
        norms=update.norms,
        nonfinite=update.nonfinite,
        is_overflow=is_overflow,
        rows=rows,
    )


def forward_backward(state: TrainState, batch: Batch) -> Tensor | None:
    """Compute gradients and this replica's loss, both times the loss scale; the loss is None before the last stage."""
    divisor = _loss_divisor(batch, state.mesh) / state.scaler.scale
    sample_numbers = None if state.stages[0].dropout is None else batch.sample_numbers
    is_bad = has_bad_ids(state, batch)
    batches = micro_batches(state, batch, is_bad=is_bad, sample_numbers=sample_numbers)
    with keeping_casts(*state.stages):  # gradients of micro-batches still add up in the parameters' own type
        loss = state.runner.train(batches, divisor)
    return _nan(state.mesh) if is_bad else loss


def evaluation_loss(state: TrainState, batch: Batch) -> float:
    """Return the mean loss over the targets of a global batch, without dropout; `batch` is this replica's part of it.

    The loss is NaN if the batch has an id outside the vocabulary.
    """
    is_bad = has_bad_ids(state, batch)
    batches = micro_batches(state, batch, is_bad=is_bad)
    with keeping_casts(*state.stages):
        loss = state.runner.evaluate(batches, _loss_divisor(batch, state.mesh))
    return mean_over_replicas(_nan(state.mesh) if is_bad else loss, state.mesh)


def micro_batches(
    state: TrainState, batch: Batch, *, is_bad: bool, sample_numbers: Tensor | None = None
) -> MicroBatches:
    """Prepare a batch for the stages: all on the device, except document lengths that are read on the host.

    Every id becomes 0 if the batch `is_bad`, that is, has an id outside the vocabulary.
    """
    ids = _to_device(batch.ids, state.mesh)
    if is_bad:
        # such ids could index outside the embedding; this rank still takes part in the step's collectives
        ids = torch.zeros_like(ids)
    # targets are shifted before the sequence is cut: the last one of a part is the first token of another
    cut = state.stages[0].context.cut
    inputs, targets = cut(ids[..., :-1]).contiguous(), cut(ids[..., 1:]).contiguous()
    if batch.ignored is not None:
        targets = targets.masked_fill(cut(_to_device(batch.ignored, state.mesh)), IGNORE_INDEX)
    starts, lengths = batch.document_starts, batch.document_lengths
    if lengths is not None and not state.kernels.attend_documents.reads_on_host:
        lengths = _to_device(lengths, state.mesh)
    return MicroBatches(
        inputs,
        targets,
        document_starts=None if starts is None else cut(_to_device(starts, state.mesh)),
        document_lengths=lengths,
        sample_numbers=None if sample_numbers is None else _to_device(sample_numbers, state.mesh),
    )


def _to_device(tensor: Tensor, mesh: Mesh) -> Tensor:
    """Copy a tensor of a batch; the host does not wait if its memory is page-locked."""
    return tensor.to(mesh.device, non_blocking=True)


def has_bad_ids(state: TrainState, batch: Batch) -> bool:
    """Return whether this replica's part of a batch has an id outside the vocabulary."""
    lowest, highest = torch.aminmax(batch.ids)
    return int(lowest) < 0 or int(highest) >= state.stages[0].config.vocab_size


def _nan(mesh: Mesh) -> Tensor:
    """Return the loss of a batch with a bad id, which tells the other ranks."""
    return torch.full((), math.nan, device=mesh.device)


def _loss_divisor(batch: Batch, mesh: Mesh) -> float:
    """Return the divisor of each rank's summed loss that makes the mean over "dp_cp" the mean over all targets.

    This is the only place where the loss is normalized: neither per micro-batch nor per rank, whose numbers of targets
    differ if some are ignored. Data- and context-parallel ranks are averaged later, gradients by FSDP and the loss by
    `mean_over_replicas`, so each divides by their average number of targets.
    """
    group = mesh.group("dp")
    if batch.ignored is None or group is None:
        return max(batch.num_targets, 1) / mesh.size("cp")  # a batch has whole sequences, the same ones on "cp"
    # reduced on the host, over gloo: reading a count from the device would wait for it
    total = all_reduce(torch.tensor(batch.num_targets), group)
    return max(int(total), 1) / mesh.size("dp_cp")


def _first_rank_nonfinite(loss: Tensor | None, mesh: Mesh) -> int:
    """Return the first rank whose own loss is non-finite."""
    if mesh.world is None:
        return 0
    is_finite = loss is None or math.isfinite(float(loss))
    first = mesh.world.size() if is_finite else mesh.world.rank()
    return int(all_reduce(torch.tensor(first, device=mesh.device), mesh.world, dist.ReduceOp.MIN))


def mean_over_replicas(loss: Tensor | None, mesh: Mesh) -> float:
    """Average the last stage's loss over the ranks of "dp_cp", on every rank; `loss` is None on the other stages."""
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if loss is not None:
        total += loss
    for axis in ("dp_cp", "pp"):
        total = all_reduce(total, mesh.group(axis))
    return float(total) / mesh.size("dp_cp")
