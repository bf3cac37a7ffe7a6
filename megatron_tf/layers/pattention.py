"""Pattention: attention over learnable key-value parameter tokens, sharded over tensor-parallel ranks.

Shapes: T tokens, D width in, E width out, N parameter tokens, n = N / R of them on each of R ranks, G projections of
the same input that run together (3 for query, key and value). TokenFormer (arXiv 2410.23168), eq. 4 to 7.

| tensor     | one rank  | R ranks    |
|------------|-----------|------------|
| x          | [T, D]    | [T, D], the same on every rank; or a part, which is gathered |
| key_tokens | [N, D]    | [n, D]     |
| value_tokens | [N, E]  | [n, E]     |
| scores     | [G, T, N] | [G, T, n]  |
| statistic  | [G, T]    | [G, T], summed over ranks |
| y          | [G, T, E] | [G, T, E], partial, to be summed over ranks |
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.errors import UserError
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.kernels.products import Products
from megatron_tf.layers.casting import CastingModule
from megatron_tf.layers.row_probe import RowProbe
from megatron_tf.parallel.collectives import all_gather_copy, all_reduce, group_size, reduce_scatter_copy
from megatron_tf.tokenformer.normalization import NORMALIZATIONS, Normalization, Reduce, accumulation_type
from megatron_tf.tokenformer.parameters import Role

BackwardSplit = Literal["2:2", "3:1"]
"""How many of the four products of a backward run in its first half, and how many in its second."""
_KEY_STD = 0.02  # model.init_method_std by default


class Pattention(CastingModule):
    """A projection D -> E by attention over N parameter tokens.

    It holds keys K [N, D], values V [N, E] and a temperature tau, and computes y = P V. P [T, N] is the row-wise
    normalization of the scores A = X K^T:

        l2_norm_gelu    P = gelu(tau A / |A|)
        gelu_l2_norm    P = tau gelu(A) / |gelu(A)|
        softmax         P = tau softmax(A)

    tau is state and does not follow from the shape: it is initialized to sqrt(N) (softmax: N), does not change when
    tokens are appended (which makes growth exact), and is saved in checkpoints and in `state_dict()`. It computes in
    the dtype of x. `products` multiply matrices, `kernels` compute P, and `recompute_scores` makes backward recompute A
    instead of saving it; none of them changes the result beyond rounding. A `probe` reads P and V in forward, except in
    fused inference. With a `backward_split`, the gradient of x may be computed before those of the tokens, in two
    passes of autograd, as zero-bubble schedules do; each pass may run once.

    On its own it takes the place of a linear layer, with initial values from `reset_parameters`. Raises UserError if
    there is no normalization `norm_activation`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_tokens: int, norm_activation: str = "l2_norm_gelu"
    ) -> None:
        super().__init__()
        if norm_activation not in NORMALIZATIONS:
            raise UserError(f"norm_activation is {norm_activation!r}: known are {', '.join(NORMALIZATIONS)}")
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, in_features))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, out_features))
        self.norm = NORMALIZATIONS[norm_activation]
        self.kernels = Kernels().pattention
        self.products = Kernels().products
        self.recompute_scores = False
        self.backward_split: BackwardSplit | None = None
        self.probe: RowProbe | None = None
        # free on the meta device, where runs and `load` build models, whose initial values depend on the whole model
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw keys from N(0, 0.02^2) and values from N(0, 1 / N) by torch's generator, and set tau as initially.

        For inputs of unit variance, outputs have a variance of about 1 (0.4 for l2_norm_gelu).
        """
        num_tokens = self.key_tokens.shape[0]
        nn.init.normal_(self.key_tokens, std=_KEY_STD)
        nn.init.normal_(self.value_tokens, std=num_tokens**-0.5)
        self.tau = self.norm.initial_tau(num_tokens)

    def get_extra_state(self) -> Tensor:
        """Return tau for `state_dict()`, as a tensor, so that a state_dict holds nothing but tensors."""
        return torch.tensor(self.tau, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take tau from a `state_dict()`."""
        self.tau = float(state)

    @torch.no_grad()
    def use(self, kernels: PattentionKernels) -> None:
        """Switch to these kernels, and store the value tokens in the memory order that is fastest for them."""
        self.kernels = kernels
        if kernels.stores_columns:
            self.value_tokens.data = self.value_tokens.t().contiguous().t()

    def forward(self, x: Tensor, group: ProcessGroup | None = None, gather_dim: int | None = None) -> Tensor:
        """Compute y [..., E] of x [..., D]: this rank's partial sum. `gather_dim` is as in `pattend`."""
        return pattend(x, [self], group, gather_dim=gather_dim)[0]

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Compute the scores A [T, N] of all T rows of x [..., D]; single rank, no gradients."""
        return x.reshape(-1, x.shape[-1]) @ self.cast(Role.KEYS, x.dtype).t()

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """Compute the weight of each parameter token, P [..., N], for x [..., D]; single rank, no gradients."""
        scores = self.scores(x)
        tau = scores.new_full(scores.shape[:1], self.tau)
        _, weights = self.kernels.forward(self.norm, scores, tau=tau, reduce=None)
        return weights.unflatten(0, x.shape[:-1])


def pattend(
    x: Tensor, projections: Sequence[Pattention], group: ProcessGroup | None, *, gather_dim: int | None = None
) -> Tensor:
    """Run G projections of the same x [..., D] together -> [G, ..., E], partial sums over the ranks of `group`.

    Their statistics take one all-reduce of G scalars per token in forward and one in backward, independent of N. With a
    `gather_dim`, the first (0) or the last (-1), x is this rank's part along it: only the part is saved for backward,
    which gathers x again.
    """
    tokens = x.reshape(-1, x.shape[-1])
    shape = list(x.shape[:-1])
    if gather_dim == 0:
        shape[0] *= group_size(group)
    keys = [p.cast(Role.KEYS, x.dtype) for p in projections]
    values = [p.cast(Role.VALUES, x.dtype) for p in projections]
    first, y = projections[0], None
    if group is None:  # several ranks have to reduce a row's statistic between the two products
        y = first.kernels.infer(first.norm, tokens, keys=keys, values=values, taus=[p.tau for p in projections])
    if y is None:
        handover = _Handover()
        edge = _TokenGradients.apply(handover, *keys, *values)
        y = _Pattend.apply(tokens, edge, projections, group, gather_dim, handover, *keys, *values)
    return y.unflatten(1, shape)


def _reductions(norm: Normalization, group: ProcessGroup | None) -> tuple[Reduce | None, Reduce | None]:
    """Return how ranks combine a row's statistics in forward and its inner products in backward."""

    def log_sum_exp(statistic: Tensor) -> Tensor:
        highest = all_reduce(statistic, group, dist.ReduceOp.MAX)
        return highest + torch.log(all_reduce(torch.exp(statistic - highest), group))

    def total(values: Tensor) -> Tensor:
        return all_reduce(values, group)

    if group is None:
        return None, None
    return log_sum_exp if norm.is_logarithmic else total, total


def _row_taus(x: Tensor, projections: Sequence[Pattention]) -> Tensor:
    """Return the temperature of every row of scores [G * T]."""
    if len({projection.tau for projection in projections}) == 1:
        return x.new_full((len(projections) * x.shape[0],), projections[0].tau, dtype=accumulation_type(x))
    taus = x.new_empty(len(projections), x.shape[0], dtype=accumulation_type(x))
    for rows, projection in zip(taus, projections, strict=True):
        # a scalar is passed as a kernel argument; copying a tensor from the host would wait for the device
        rows.fill_(projection.tau)
    return taus.flatten()


def _whole(part: Tensor, gather_dim: int | None, group: ProcessGroup | None) -> Tensor:
    """Gather x [T, D] from the parts of all ranks, if it is sharded."""
    return part if gather_dim is None else all_gather_copy(part, gather_dim, group)


def _score(x: Tensor, keys: Sequence[Tensor], products: Products) -> Tensor:
    """Compute the scores [G, T, n] of x [T, D]."""
    # one tensor, so that a kernel handles the rows of all projections at once
    scores = x.new_empty(len(keys), x.shape[0], keys[0].shape[0])
    for out, key in zip(scores, keys, strict=True):
        products.mm(x, key.t(), out=out)
    return scores


@dataclass
class _TokenOperands:
    """What the gradients of the tokens are computed from; G tensors each, one for each projection."""

    projections: Sequence[Pattention]
    x: Tensor
    """The input [T, D], or this rank's part of it if there is a `gather_dim`."""
    gather_dim: int | None
    group: ProcessGroup | None
    d_scores: Tensor
    """[G, T, n]"""
    d_values: Sequence[Tensor] | None
    """[n, E] each if they have been computed; otherwise, `weights` and `dy` are there."""
    weights: Tensor | None = None
    """[G, T, n]"""
    dy: Tensor | None = None
    """[G, T, E]"""


@dataclass
class _Handover:
    """Connects the two nodes of a Pattention in the graph of autograd."""

    operands: _TokenOperands | None = None
    """Set by the first half of backward, taken by the second."""


class _Pattend(torch.autograd.Function):
    """Saves x, the scores and one factor per row for backward, less than an MLP saves; the weights are recomputed.

    Backward computes the gradient of x. Those of the tokens are computed by `_TokenGradients`, a node of its own, so
    that autograd can run it later or not at all: it does not tell a Function which gradients are wanted. `edge` leads
    to that node.
    """

    @staticmethod
    def forward(
        ctx: Any,
        part: Tensor,
        edge: Tensor,
        projections: Sequence[Pattention],
        group: ProcessGroup | None,
        gather_dim: int | None,
        handover: _Handover,
        *tokens: Tensor,
    ) -> Tensor:
        keys, values = tokens[: len(projections)], tokens[len(projections) :]
        first = projections[0]
        x = _whole(part, gather_dim, group)
        scores = _score(x, keys, first.products)
        reduce, _ = _reductions(first.norm, group)
        factor, weights = first.kernels.forward(
            first.norm, scores.flatten(0, 1), tau=_row_taus(x, projections), reduce=reduce
        )
        y = x.new_empty(len(projections), x.shape[0], values[0].shape[1])
        for projection, out, weight, value in zip(projections, y, weights.view_as(scores), values, strict=True):
            first.products.mix(weight, value, out=out)
            if projection.probe is not None:
                projection.probe.measure(weight, value)
        ctx.save_for_backward(part, factor, *([] if first.recompute_scores else [scores]), *tokens)
        ctx.projections, ctx.group, ctx.gather_dim, ctx.handover = projections, group, gather_dim, handover
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        projections, handover, dy = ctx.projections, ctx.handover, grads[0]
        edge = dy.new_empty(0) if ctx.needs_input_grad[1] else None
        rest = (None,) * (4 + 2 * len(projections))
        if handover.operands is not None:  # the second pass of a split backward: the first one has computed dx
            return None, edge, *rest
        first = projections[0]
        part, factor, *saved = ctx.saved_tensors
        x = _whole(part, ctx.gather_dim, ctx.group)
        tokens = saved if first.recompute_scores else saved[1:]
        keys, values = tokens[: len(projections)], tokens[len(projections) :]
        scores = _score(x, keys, first.products) if first.recompute_scores else saved[0]
        # one buffer for dP and then dA: the kernels may overwrite it
        grad = torch.empty_like(scores)
        for out, dy_g, value in zip(grad, dy, values, strict=True):
            first.products.mm(dy_g, value.t(), out=out, gradient="left")
        _, reduce = _reductions(first.norm, ctx.group)
        weights, d_scores = first.kernels.backward(
            first.norm,
            scores.flatten(0, 1),
            factor=factor,
            grad=grad.flatten(0, 1),
            tau=_row_taus(x, projections),
            reduce=reduce,
        )
        operands = _TokenOperands(
            projections=projections,
            x=x,
            gather_dim=None,
            group=ctx.group,
            d_scores=d_scores.view_as(scores),
            d_values=None,
            weights=weights.view_as(scores),
            dy=dy,
        )
        dx = _input_gradient(operands, keys)
        # private, but what torch's own register_multi_grad_hook asks
        if edge is not None and torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            handover.operands = operands
        elif edge is not None and first.backward_split is not None:
            handover.operands = _kept_for_later(operands, first.backward_split, part=part, gather_dim=ctx.gather_dim)
            # autograd holds the scores until the second pass, which does not read them: the weights take their place
            scores.untyped_storage().resize_(0)
        if ctx.gather_dim is not None:
            dx = reduce_scatter_copy(dx, ctx.gather_dim, ctx.group)
        return dx, edge, *rest


class _TokenGradients(torch.autograd.Function):
    """The second half of a Pattention's backward. Its output is empty: it only connects the two nodes."""

    @staticmethod
    def forward(ctx: Any, handover: _Handover, *tokens: Tensor) -> Tensor:
        ctx.handover = handover
        return tokens[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        operands, ctx.handover.operands = ctx.handover.operands, None
        assert operands is not None, "the gradients of the tokens have been computed already"
        return None, *_key_gradients(operands), *(operands.d_values or _value_gradients(operands))


def _kept_for_later(
    operands: _TokenOperands, split: BackwardSplit, *, part: Tensor, gather_dim: int | None
) -> _TokenOperands:
    """Return the operands as they are kept between two passes: x is gathered again then, which keeps only a part."""
    kept = replace(operands, x=part, gather_dim=gather_dim)
    return kept if split == "2:2" else replace(kept, d_values=_value_gradients(operands), weights=None, dy=None)


def _input_gradient(operands: _TokenOperands, keys: Sequence[Tensor]) -> Tensor:
    """Compute dx [T, D], this rank's partial sum."""
    products, d_scores = operands.projections[0].products, operands.d_scores
    # accumulated: the projections share x, and one gradient for each would take G times the memory
    dx = products.mm(d_scores[0], keys[0], gradient="left")
    for d_score, key in zip(d_scores[1:], keys[1:], strict=True):
        products.add_mm(dx, d_score, key, gradient="left")
    return dx


def _key_gradients(operands: _TokenOperands) -> list[Tensor]:
    """Compute dK [n, D] of each projection."""
    mm = operands.projections[0].products.mm
    x = _whole(operands.x, operands.gather_dim, operands.group)
    return [mm(d_score.t(), x, gradient="left") for d_score in operands.d_scores]


def _value_gradients(operands: _TokenOperands) -> list[Tensor]:
    """Compute dV [n, E] of each projection."""
    mm, weights, dy = operands.projections[0].products.mm, operands.weights, operands.dy
    assert weights is not None
    assert dy is not None
    return [mm(weight.t(), dy_g, gradient="right") for weight, dy_g in zip(weights, dy, strict=True)]
