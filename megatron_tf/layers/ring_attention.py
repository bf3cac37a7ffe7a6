"""Causal attention over sequences that context-parallel ranks share, with keys and values passed around a ring.

From ring attention (arXiv 2310.01889). Each of R ranks has s tokens of each of B samples. In each of R steps,

| | forward | backward |
|---|---|---|
| computes | attention to the keys and values at hand, merged | gradients of queries, and of these keys and values |
| meanwhile passes on | these keys and values | these, and the gradients of those before |

Keys and values move R - 1 times in each direction. So do their gradients, in the accumulation type: they start at the
rank after the owner of the keys and values, and end at the owner, which adds its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.kernels.attention_block import attend_block, attend_block_backward
from megatron_tf.kernels.documents import AttendDocuments, Documents
from megatron_tf.layers.ring_plan import Block, Plan, plan_documents, plan_sequences
from megatron_tf.parallel.context import Context
from megatron_tf.parallel.ring import Passing, pass_on
from megatron_tf.tokenformer.dtypes import wide_dtype


@dataclass(frozen=True)
class RingAttention:
    """Attention of this rank's tokens to all earlier ones of their sequences, as an `Attend`."""

    context: Context

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q to k, v, all [s, B, h, d] -> [s, B, h, d]."""
        return _attend(q, k, v, plan_sequences(self.context, len(q)), self.context)


@dataclass(frozen=True)
class RingDocuments(AttendDocuments):
    """The same within documents, which may reach over several ranks."""

    context: Context
    reads_on_host: ClassVar[bool] = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        return _attend(q, k, v, plan_documents(self.context, len(q), documents.on_host), self.context)


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, context: Context) -> Tensor:
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out: Tensor = _Ring.apply(q, torch.stack((k, v)), plan, context.group)
    return out.permute(2, 0, 1, 3)


class _Ring(torch.autograd.Function):
    """q [B, h, s, d] and the rank's own keys and values [2, B, h, s, d] -> [B, h, s, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, plan: Plan, group: ProcessGroup) -> Tensor:
        own = kv
        merged = _Merged(q)
        for step, blocks in enumerate(plan):
            passing = _pass_unless_last(kv, step, plan, group)
            for block in blocks:
                merged.add(block, *attend_block(*_operands(block, q, kv), is_causal=block.is_causal))
            kv = passing.wait() if passing else kv
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, own, out, merged.log_sum)
        ctx.plan, ctx.group = plan, group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, kv, out, log_sum = ctx.saved_tensors
        wide = wide_dtype(q.dtype)
        grad_q = torch.zeros_like(q, dtype=wide)
        own_grad: Tensor | None = None
        arriving: Passing | None = None
        for step, blocks in enumerate(ctx.plan):
            passing = _pass_unless_last(kv, step, ctx.plan, ctx.group)
            grad_kv = torch.zeros_like(kv, dtype=wide)
            for block in blocks:
                _add_gradients(block, grads[0], q, kv, out=out, log_sum=log_sum, grad_q=grad_q, grad_kv=grad_kv)
            if step == 0:
                own_grad = grad_kv
            else:
                # what the ranks before have added for these keys and values
                grad_kv = grad_kv if arriving is None else grad_kv.add_(arriving.wait())
                arriving = pass_on(grad_kv, ctx.group)
            kv = passing.wait() if passing else kv
        assert own_grad is not None
        assert arriving is not None
        return grad_q.to(q.dtype), own_grad.add_(arriving.wait()).to(kv.dtype), None, None


class _Merged:
    """The output of attention to the blocks of keys so far, and the log-sum-exp of each query's scores."""

    def __init__(self, q: Tensor) -> None:
        self.out = torch.zeros_like(q, dtype=wide_dtype(q.dtype))
        self.log_sum = self.out.new_full(q.shape[:-1], -torch.inf)

    def add(self, block: Block, out: Tensor, log_sum: Tensor) -> None:
        """Add a block's output and log-sum-exp, which is finite since each of its queries attends to a key."""
        old_out = self.out[block.samples, :, block.queries]
        old_log_sum = self.log_sum[block.samples, :, block.queries]
        total = torch.logaddexp(old_log_sum, log_sum)
        old_out.mul_((old_log_sum - total).exp_()[..., None]).addcmul_(out, (log_sum - total).exp_()[..., None])
        old_log_sum.copy_(total)


def _pass_unless_last(kv: Tensor, step: int, plan: Plan, group: ProcessGroup) -> Passing | None:
    return pass_on(kv, group) if step + 1 < len(plan) else None


def _operands(block: Block, q: Tensor, kv: Tensor) -> Sequence[Tensor]:
    """Return the block's queries, keys and values."""
    return q[block.samples, :, block.queries], *kv[:, block.samples, :, block.keys].unbind(0)


def _add_gradients(
    block: Block, grad: Tensor, q: Tensor, kv: Tensor, *, out: Tensor, log_sum: Tensor, grad_q: Tensor, grad_kv: Tensor
) -> None:
    """Add what a block contributes to the gradients of queries, and of keys and values."""
    grad, out, log_sum, grad_q = (t[block.samples, :, block.queries] for t in (grad, out, log_sum, grad_q))
    dq, dk, dv = attend_block_backward(
        grad, *_operands(block, q, kv), out=out, log_sum=log_sum, is_causal=block.is_causal
    )
    grad_q.add_(dq)
    grad_k, grad_v = grad_kv[:, block.samples, :, block.keys]
    grad_k.add_(dk)
    grad_v.add_(dv)
