"""Cross-entropy of hidden states, fused with the product that computes their logits.

The vocabulary is sharded: the weight is [V / R, D] on each of R ranks. Logits exist for a chunk of tokens at a time;
gradients, where needed, are computed while the logits exist:

| of a chunk of t tokens | shape | used for |
|---|---|---|
| logits | [t, V / R] | statistics, which the ranks combine to the losses [t] |
| gradient of the logits, in place | [t, V / R] | both products below |
| this times the weight | [t, D] | gradient of the hidden states |
| its transpose times the hidden states | [V / R, D] | added to the gradient of the weight |

The ranks communicate once per chunk, two numbers per token; without gradients, once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.kernels.loss import EagerLoss, LossKernels
from megatron_tf.parallel.collectives import all_gather_copy, group_rank, group_size
from megatron_tf.tokenformer.dtypes import wide_dtype

IGNORE_INDEX = -1
"""Target that is excluded from the loss; it is outside every rank's shard of the vocabulary."""
# Logits of a chunk. Smaller chunks need less memory, but each one reads and writes the gradient of the weight.
_CPU_LOGITS, _GPU_LOGITS = 1 << 26, 1 << 27


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    divisor: float,
    group: ProcessGroup | None,
    kernels: LossKernels,
    cast_weight: Tensor | None = None,
) -> Tensor:
    """Compute the summed loss of hidden states [T, D] and target ids [T] over `divisor`, the same on every rank.

    Returns a scalar in fp32, or in fp64 for fp64. Targets that are IGNORE_INDEX add nothing. Products are computed in
    the dtype of `hidden`, from `cast_weight`, which is `weight` [V / R, D] in this dtype if it exists already. The
    gradient of `weight` is accumulated over chunks in the dtype of the loss; the gradient of `hidden` is this rank's
    partial sum. Backward can run only once.
    """
    product_weight = weight.detach().to(hidden.dtype) if cast_weight is None else cast_weight
    if torch.is_grad_enabled():
        gradient = _SumOfProducts()
        edge = _WeightGradient.apply(weight, gradient)
        loss: Tensor = _HeadLoss.apply(hidden, edge, product_weight, targets, divisor, group, kernels, gradient)
        return loss
    local_targets = _local_targets(targets, len(weight), group)
    statistics = hidden.new_empty(2, len(hidden), dtype=wide_dtype(hidden.dtype))
    for rows, logits in _logit_chunks(hidden, product_weight):
        statistics[0, rows], statistics[1, rows] = kernels.statistics(logits, local_targets[rows])
    log_total, chosen = _over_vocabulary(statistics, group)
    return _divided_sum(log_total - chosen, targets, divisor)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss of each token, [T] in fp32 or for fp64 in fp64, from logits [T, V] of the whole vocabulary.

    Works outside autograd.
    """
    log_total, chosen = EagerLoss().statistics(logits, targets)
    return log_total - chosen


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients in forward, since saving or recomputing the logits costs more; backward scales them.

    That of the weight is scaled by `_WeightGradient`, to which `edge` leads, so that autograd can run it later.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        edge: Tensor,
        product_weight: Tensor,
        targets: Tensor,
        divisor: float,
        group: ProcessGroup | None,
        kernels: LossKernels,
        grad_weight: "_SumOfProducts",
    ) -> Tensor:
        local_targets = _local_targets(targets, len(product_weight), group)
        losses = hidden.new_empty(len(hidden), dtype=wide_dtype(hidden.dtype))
        # divided before the products: in fp16 the gradient of a sum over many tokens would overflow
        scale = (targets != IGNORE_INDEX).to(losses.dtype) / divisor
        grad_hidden = torch.empty_like(hidden)
        for rows, logits in _logit_chunks(hidden, product_weight):
            local = torch.stack(kernels.statistics(logits, local_targets[rows]))
            log_total, chosen = _over_vocabulary(local, group)
            torch.sub(log_total, chosen, out=losses[rows])
            kernels.gradient(logits, local_targets[rows], log_total=log_total, scale=scale[rows])
            torch.mm(logits, product_weight, out=grad_hidden[rows])
            grad_weight.add(logits.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden)
        return _divided_sum(losses, targets, divisor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grads[0], grads[0], None, None, None, None, None, None


class _WeightGradient(torch.autograd.Function):
    """Returns the gradient of the weight, scaled; its output, a scalar, only connects it to `_HeadLoss`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: "_SumOfProducts") -> Tensor:
        ctx.gradient, ctx.dtype = gradient, weight.dtype
        return weight.new_empty((), dtype=wide_dtype(weight.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.take().mul_(grads[0]).to(ctx.dtype), None


def _logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of `hidden` and their logits [t, V / R], which the next ones overwrite."""
    tokens, columns = len(hidden), len(weight)
    largest = _CPU_LOGITS if hidden.device.type == "cpu" else _GPU_LOGITS
    num_chunks = max(1, -(-tokens * columns // largest))
    step = max(1, -(-tokens // num_chunks))  # chunks of equal size, without a small one at the end
    buffer = hidden.new_empty(step, columns)
    for start in range(0, tokens, step):
        rows = slice(start, min(tokens, start + step))
        logits = buffer[: rows.stop - start]
        yield rows, torch.mm(hidden[rows], weight.t(), out=logits)


def _local_targets(targets: Tensor, columns: int, group: ProcessGroup | None) -> Tensor:
    """Return targets as indices of this rank's shard of the vocabulary, -1 for all outside it."""
    local = targets - group_rank(group) * columns
    return local.masked_fill_((local < 0) | (local >= columns), -1)


def _over_vocabulary(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """Combine the statistics [2, t] of every rank's shard to those of the whole vocabulary."""
    if group is None:
        return local
    # one all-gather instead of two all-reduces, of the maximum and then of the sums
    parts = all_gather_copy(local, 0, group).unflatten(0, (group_size(group), 2))
    return torch.stack((parts[:, 0].logsumexp(0), parts[:, 1].sum(0)))


def _divided_sum(losses: Tensor, targets: Tensor, divisor: float) -> Tensor:
    return losses.masked_fill(targets == IGNORE_INDEX, 0.0).sum() / divisor


class _SumOfProducts:
    """The sum of left @ right over chunks, accumulated in the accumulation dtype from the second chunk on."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self._product: Tensor | None = None  # buffer for a product in 16 bits

    def take(self) -> Tensor:
        """Return the sum, which is then no longer kept. Raises RuntimeError the second time."""
        if self.total is None:
            raise RuntimeError("backward of the loss can run only once")
        total, self.total = self.total, None
        return total

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add the product of one chunk."""
        wide = wide_dtype(left.dtype)
        if left.dtype != wide and left.device.type == "cuda":  # cuBLAS can add a 16-bit product to an fp32 sum
            self.total = (
                torch.mm(left, right, out_dtype=wide)
                if self.total is None
                else torch.addmm(self.total, left, right, out_dtype=wide, out=self.total)
            )
        elif self.total is None:
            self.total = left @ right
        elif left.dtype == wide:
            self.total.addmm_(left, right)
        else:
            if self._product is None:
                self._product, self.total = self.total, self.total.to(wide)
            self.total.add_(torch.mm(left, right, out=self._product))
