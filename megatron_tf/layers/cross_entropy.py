"""Cross-entropy over logits whose vocabulary is sharded: [T, V / R] on each of R ranks."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.parallel.collectives import all_reduce, group_rank

IGNORE_INDEX = -1
"""A target that no loss is taken of: it is outside of every rank's shard, and the caller masks its loss."""
_CHUNK_ELEMENTS = 1 << 22  # logits that are widened to fp32 at a time


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and one number a token; the gradient is made chunk by chunk in the place of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: ProcessGroup | None) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        # of all ranks, so that their sums of exponentials have one scale and none overflows
        highest = all_reduce(logits.amax(-1).to(wide), group, dist.ReduceOp.MAX)
        total = torch.empty_like(highest)
        for rows in _row_chunks(logits):
            total[rows] = logits[rows].to(wide, copy=True).sub_(highest[rows, None]).exp_().sum(-1)
        local_targets = targets - group_rank(group) * logits.shape[-1]
        outside = (local_targets < 0) | (local_targets >= logits.shape[-1])
        local_targets = local_targets.masked_fill(outside, 0)
        chosen = logits.gather(-1, local_targets[:, None])[:, 0].to(wide).masked_fill(outside, 0.0)
        total, chosen = all_reduce(torch.stack((total, chosen)), group)
        log_total = highest + torch.log(total)
        ctx.save_for_backward(logits, log_total, local_targets, outside)
        return log_total - chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, log_total, local_targets, outside = ctx.saved_tensors
        grad = logits.detach()
        for rows in _row_chunks(logits):
            softmax = logits[rows].to(log_total.dtype, copy=True).sub_(log_total[rows, None]).exp_()
            softmax.scatter_add_(-1, local_targets[rows, None], -(~outside[rows])[:, None].to(softmax.dtype))
            grad[rows] = softmax.mul_(grads[0][rows, None])
        return grad, None, None


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def cross_entropy(logits: Tensor, targets: Tensor, group: ProcessGroup | None) -> Tensor:
    """Loss of each token, fp32 [T], the same on every rank; logits [T, V / R], target ids [T].

    Backward writes the gradient over the logits: nothing else may need them then, and it runs once.
    """
    return _CrossEntropy.apply(logits, targets, group)
