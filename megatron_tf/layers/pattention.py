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

from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.kernels.value_product import mix_values
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.sharding import local_tensor
from megatron_tf.tokenformer.normalisation import NORMALISATIONS, Normalisation, Reduce, accumulation_type


class Pattention(nn.Module):
    """Holds the parameter tokens K [N, D] and V [N, E] of one projection D -> E and its temperature tau: y = P V, where
    each row of P [T, N] is made of a row of the scores A = X K^T by a normalisation:

        l2_norm_gelu    P = gelu(tau A / |A|)
        gelu_l2_norm    P = tau gelu(A) / |gelu(A)|
        softmax         P = tau softmax(A)

    tau is state, not shape: it starts as sqrt(N) (softmax: N), is kept when tokens are appended (which makes growth
    exact), and is saved in checkpoints. `kernels` compute P, and `recompute_scores` says whether backward makes A again
    instead of keeping it; neither changes what is computed.
    """

    def __init__(self, in_features: int, out_features: int, *, num_tokens: int, norm_activation: str) -> None:
        super().__init__()
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, in_features))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, out_features))
        self.norm = NORMALISATIONS[norm_activation]
        self.tau = self.norm.initial_tau(num_tokens)
        self.kernels = Kernels().pattention
        self.recompute_scores = False

    @torch.no_grad()
    def use(self, kernels: PattentionKernels) -> None:
        """Compute with these kernels, and store the values as they are fastest; no value changes."""
        self.kernels = kernels
        if kernels.stores_columns:
            self.value_tokens.data = self.value_tokens.t().contiguous().t()

    def forward(self, x: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """Compute y [..., E] of x [..., D]: this rank's partial sum."""
        return pattend(x, [self], group)[0]

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """Compute what each parameter token counts for: P [..., N] of x [..., D], on one rank, without gradients."""
        scores = x.reshape(-1, x.shape[-1]) @ local_tensor(self.key_tokens).to(x.dtype).t()
        tau = scores.new_full(scores.shape[:1], self.tau)
        _, weights = self.kernels.forward(self.norm, scores, tau=tau, reduce=None)
        return weights.unflatten(0, x.shape[:-1])


def pattend(x: Tensor, projections: Sequence[Pattention], group: ProcessGroup | None) -> Tensor:
    """Run projections of the same x [..., D] together: [G, ..., E], partial sums over the ranks of `group`.

    The statistics of all G cost one all-reduce of G scalars a token in each direction, whatever N is.
    """
    tokens = x.reshape(-1, x.shape[-1])
    keys = [_of_type(p.key_tokens, x) for p in projections]
    values = [_of_type(p.value_tokens, x) for p in projections]
    first, y = projections[0], None
    if group is None:  # ranks that share a row's statistic have to meet between the products
        y = first.kernels.infer(first.norm, tokens, keys=keys, values=values, taus=[p.tau for p in projections])
    if y is None:
        y = _Pattend.apply(tokens, projections, group, *keys, *values)
    return y.unflatten(1, x.shape[:-1])


def _of_type(parameter: Tensor, x: Tensor) -> Tensor:
    rows = local_tensor(parameter)
    return rows if rows.dtype == x.dtype else rows.to(x.dtype)


def _reductions(norm: Normalisation, group: ProcessGroup | None) -> tuple[Reduce | None, Reduce | None]:
    """How statistics, and inner products in backward, of the ranks make those of the row."""

    def log_sum_exp(statistic: Tensor) -> Tensor:
        highest = all_reduce(statistic, group, dist.ReduceOp.MAX)
        return highest + torch.log(all_reduce(torch.exp(statistic - highest), group))

    def total(values: Tensor) -> Tensor:
        return all_reduce(values, group)

    if group is None:
        return None, None
    return log_sum_exp if norm.is_logarithmic else total, total


def _row_taus(x: Tensor, projections: Sequence[Pattention]) -> Tensor:
    """Temperatures of all rows [G * T]."""
    taus = torch.tensor([p.tau for p in projections], dtype=torch.float64)
    return taus.to(accumulation_type(x)).to(x.device).repeat_interleave(x.shape[0])


def _score(x: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """Scores [G, T, n] of x [T, D]."""
    # in one tensor, so that the kernels take the rows of all projections at once
    scores = x.new_empty(len(keys), x.shape[0], keys[0].shape[0])
    for out, key in zip(scores, keys, strict=True):
        torch.mm(x, key.t(), out=out)
    return scores


class _Pattend(torch.autograd.Function):
    """Keeps x, the scores and one factor a row for backward: less than an MLP keeps. The weights are recomputed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: Sequence[Pattention], group: ProcessGroup | None, *tokens: Tensor
    ) -> Tensor:
        keys, values = tokens[: len(projections)], tokens[len(projections) :]
        first = projections[0]
        scores = _score(x, keys)
        reduce, _ = _reductions(first.norm, group)
        factor, weights = first.kernels.forward(
            first.norm, scores.flatten(0, 1), tau=_row_taus(x, projections), reduce=reduce
        )
        y = x.new_empty(len(projections), x.shape[0], values[0].shape[1])
        for out, weight, value in zip(y, weights.view_as(scores), values, strict=True):
            mix_values(weight, value, out)
        ctx.save_for_backward(x, factor, *([] if first.recompute_scores else [scores]), *tokens)
        ctx.projections, ctx.group = projections, group
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        projections, dy = ctx.projections, grads[0]
        first = projections[0]
        x, factor, *rest = ctx.saved_tensors
        tokens = rest if first.recompute_scores else rest[1:]
        keys, values = tokens[: len(projections)], tokens[len(projections) :]
        scores = _score(x, keys) if first.recompute_scores else rest[0]
        # one buffer for dP and then dA: the kernels may write over it
        grad = torch.empty_like(scores)
        for out, dy_g, value in zip(grad, dy, values, strict=True):
            torch.mm(dy_g, value.t(), out=out)
        _, reduce = _reductions(first.norm, ctx.group)
        weights, d_scores = first.kernels.backward(
            first.norm,
            scores.flatten(0, 1),
            factor=factor,
            grad=grad.flatten(0, 1),
            tau=_row_taus(x, projections),
            reduce=reduce,
        )
        grad = d_scores.view_as(scores)
        d_values = [torch.mm(w.t(), dy_g) for w, dy_g in zip(weights.view_as(scores), dy, strict=True)]
        d_keys = [torch.mm(d_score.t(), x) for d_score in grad]
        # added as it is made: the projections share x, and a gradient for each would take G times the memory
        dx = torch.mm(grad[0], keys[0])
        for d_score, key in zip(grad[1:], keys[1:], strict=True):
            dx.addmm_(d_score, key)
        return dx, None, None, *d_keys, *d_values
