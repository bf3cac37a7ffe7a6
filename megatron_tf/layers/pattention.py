"""Pattention: attention over learnable key-value parameter tokens, sharded over tensor-parallel ranks.

Shapes: T tokens, D width in, E width out, N parameter tokens, n = N / R of them on each of R ranks, G projections of
the same input that run together (3 for query, key and value). TokenFormer (arXiv 2410.23168), eq. 4 to 7.

| tensor     | one rank  | R ranks    |
|------------|-----------|------------|
| x          | [T, D]    | [T, D], the same on every rank |
| key_tokens | [N, D]    | [n, D]     |
| value_tokens | [N, E]  | [n, E]     |
| scores     | [G, T, N] | [G, T, n]  |
| statistic  | [G, T]    | [G, T], summed over ranks |
| y          | [G, T, E] | [G, T, E], partial: to be summed over ranks |
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.kernels.pattention import (
    NORMALISATIONS,
    Normalisation,
    backward_first,
    backward_second,
    mix_values,
    row_statistic,
    value_weights,
)
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.sharding import local_tensor


class Pattention(nn.Module):
    """The parameter tokens of one projection D -> E, and its temperature tau.

    tau is state, not shape: it is born from the number of tokens, kept when tokens are appended (which makes growth
    exact), and saved in checkpoints.
    """

    def __init__(self, in_features: int, out_features: int, num_tokens: int, norm_activation: str) -> None:
        super().__init__()
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, in_features))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, out_features))
        self.norm = NORMALISATIONS[norm_activation]
        self.tau = self.norm.tau_at_birth(num_tokens)

    def forward(self, x: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """x [..., D] -> [..., E], this rank's partial sum."""
        return pattend(x, [self], group)[0]

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """What each parameter token counts for: P [..., N] of x [..., D], on one rank, without gradients."""
        scores = x.reshape(-1, x.shape[-1]) @ local_tensor(self.key_tokens).to(x.dtype).t()
        statistic = row_statistic(self.norm, scores)
        factor = self.norm.factor(statistic, torch.full_like(statistic, self.tau))
        return value_weights(self.norm, scores, factor).unflatten(0, x.shape[:-1])


def pattend(x: Tensor, projections: Sequence[Pattention], group: ProcessGroup | None) -> Tensor:
    """Run projections of the same x [..., D] together: [G, ..., E], partial sums over the ranks of `group`.

    The statistics of all G cost one all-reduce of G scalars a token in each direction, whatever N is.
    """
    tokens = x.reshape(-1, x.shape[-1])
    keys = [local_tensor(p.key_tokens).to(x.dtype) for p in projections]
    values = [local_tensor(p.value_tokens).to(x.dtype) for p in projections]
    taus = [p.tau for p in projections]
    y = _Pattend.apply(tokens, projections[0].norm, taus, group, *keys, *values)
    return y.unflatten(1, x.shape[:-1])


def _sum_statistic(statistic: Tensor, norm: Normalisation, group: ProcessGroup | None) -> Tensor:
    if not norm.is_logarithmic or group is None:
        return all_reduce(statistic, group)
    highest = all_reduce(statistic, group, dist.ReduceOp.MAX)
    return highest + torch.log(all_reduce(torch.exp(statistic - highest), group))


class _Pattend(torch.autograd.Function):
    """Keeps x, the scores and one factor a row for backward: less than an MLP keeps. The weights are recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Normalisation,
        taus: list[float],
        group: ProcessGroup | None,
        *tokens: Tensor,
    ) -> Tensor:
        keys, values = tokens[: len(taus)], tokens[len(taus) :]
        scores = x.new_empty(len(taus), x.shape[0], keys[0].shape[0])
        for score, key in zip(scores, keys, strict=True):
            torch.mm(x, key.t(), out=score)
        statistic = _sum_statistic(row_statistic(norm, scores.flatten(0, 1)), norm, group)
        tau = statistic.new_tensor(taus).repeat_interleave(x.shape[0])
        factor = norm.factor(statistic, tau)
        weights = value_weights(norm, scores.flatten(0, 1), factor).view_as(scores)
        y = x.new_empty(len(taus), x.shape[0], values[0].shape[1])
        for out, weight, value in zip(y, weights, values, strict=True):
            mix_values(weight, value, out)
        ctx.save_for_backward(x, scores, factor, *tokens)
        ctx.norm, ctx.taus, ctx.group = norm, taus, group
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, scores, factor, *tokens = ctx.saved_tensors
        norm, taus, dy = ctx.norm, ctx.taus, grads[0]
        keys, values = tokens[: len(taus)], tokens[len(taus) :]
        grad = torch.empty_like(scores)
        for out, dy_g, value in zip(grad, dy, values, strict=True):
            torch.mm(dy_g, value.t(), out=out)
        rows, flat_grad = scores.flatten(0, 1), grad.flatten(0, 1)
        weights, inner = backward_first(norm, rows, factor, flat_grad)
        d_values = [torch.mm(w.t(), dy_g) for w, dy_g in zip(weights.view_as(scores), dy, strict=True)]
        tau = inner.new_tensor(taus).repeat_interleave(x.shape[0])
        share = all_reduce(inner, ctx.group) / tau**norm.tau_power
        backward_second(norm, rows, factor, flat_grad, share)
        d_keys = [torch.mm(d_score.t(), x) for d_score in grad]
        dx = torch.mm(grad[0], keys[0])
        for d_score, key in zip(grad[1:], keys[1:], strict=True):
            dx.addmm_(d_score, key)
        return dx, None, None, None, *d_keys, *d_values
