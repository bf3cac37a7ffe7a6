"""Cross-entropy over logits whose vocabulary is sharded: [T, V / R] on each of R ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.parallel.collectives import all_reduce, group_rank


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and one number a token; the softmax is made again in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: ProcessGroup | None) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        highest = all_reduce(wide.amax(-1), group, dist.ReduceOp.MAX)
        total = torch.exp(wide - highest[:, None]).sum(-1)
        local_targets = targets - group_rank(group) * logits.shape[-1]
        foreign = (local_targets < 0) | (local_targets >= logits.shape[-1])
        local_targets = local_targets.masked_fill(foreign, 0)
        chosen = wide.gather(-1, local_targets[:, None])[:, 0].masked_fill(foreign, 0.0)
        total, chosen = all_reduce(torch.stack((total, chosen)), group)
        log_total = highest + torch.log(total)
        ctx.save_for_backward(logits, log_total, local_targets, foreign)
        return log_total - chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, log_total, local_targets, foreign = ctx.saved_tensors
        softmax = torch.exp(logits.to(log_total.dtype) - log_total[:, None])
        softmax.scatter_add_(-1, local_targets[:, None], -(~foreign)[:, None].to(softmax.dtype))
        return softmax.mul_(grads[0][:, None]).to(logits.dtype), None, None


def cross_entropy(logits: Tensor, targets: Tensor, group: ProcessGroup | None) -> Tensor:
    """Loss of each token, fp32 [T], the same on every rank; logits [T, V / R], target ids [T]."""
    return _CrossEntropy.apply(logits, targets, group)
