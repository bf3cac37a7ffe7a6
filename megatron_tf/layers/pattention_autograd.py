"""Forward and backward of Pattention as two nodes in the graph of autograd. Shapes are those of `pattention`.

The first node computes y, and dx in backward; the second one only the gradients of the tokens. Autograd does not tell a
custom Function which gradients are wanted, but it runs no node whose gradients nobody wants: two nodes let a pipeline
schedule ask for dx first and for dK and dV later, each computed once.

On several ranks, a third node waits for the sum of dx over the ranks. Autograd runs what was recorded last first, so
the gradients of the tokens are computed while the sum is on its way. Tensors inside are in the order of token_chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.kernels.products import Products
from megatron_tf.layers.token_chunks import Chunked, Port, TensorRanks, rows_of
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.tokenformer.dtypes import wide_dtype
from megatron_tf.tokenformer.normalization import Normalization, Reduce

if TYPE_CHECKING:
    from megatron_tf.layers.pattention import Pattention

BackwardSplit = Literal["2:2", "3:1"]
"""How many of the four products of a backward run in its first half, and how many in its second."""


def differentiable_pattention(
    x: Tensor,
    projections: Sequence[Pattention],
    *,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ranks: TensorRanks,
) -> Tensor:
    """Compute y [G, T, E] of x [T, D] with gradients of x and of the projections' tokens.

    `keys` and `values` are these tokens in the dtype of x, detached. Of x and y, this rank has the part that `ranks`
    says.
    """
    handover = _Handover()
    if ranks.group is not None:
        x = _Arrival.apply(x, handover)
    # the parameters themselves: autograd casts their gradients, without a node of ours for each of them
    edge = _TokenGradients.apply(handover, *(p.key_tokens for p in projections), *(p.value_tokens for p in projections))
    return _Pattend.apply(x, edge, projections, ranks, handover, keys, values)


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


def _row_taus(scores: Tensor, projections: Sequence[Pattention]) -> Tensor:
    """Return the temperature of every row [G * T] of scores [G, T, n]."""
    shape, dtype = scores.shape[:2], wide_dtype(scores.dtype)
    if len({projection.tau for projection in projections}) == 1:
        return scores.new_full((shape.numel(),), projections[0].tau, dtype=dtype)
    taus = scores.new_empty(shape, dtype=dtype)
    for rows, projection in zip(taus, projections, strict=True):
        # a scalar is passed as a kernel argument; copying a tensor from the host would wait for the device
        rows.fill_(projection.tau)
    return taus.flatten()


def _score(x: Chunked, keys: Sequence[Tensor], products: Products) -> Tensor:
    """Compute the scores [G, T, n] of x [1, T, D], of each chunk when it has arrived."""
    num_tokens, num_keys = x.tensor.shape[1], len(keys[0])
    # one tensor, so that a kernel handles the rows of all projections at once
    scores = x.tensor.new_empty(len(keys), num_tokens, num_keys)
    for rows, chunk in x.chunks():
        for out, key in zip(rows_of(scores, rows).unbind(), keys, strict=True):
            products.mm(chunk[0], key.t(), out=out)
    return scores


@dataclass
class _Input:
    """The input x as it is saved for backward."""

    saved: Tensor
    """[1, T, D], or this rank's part of it."""
    port: Port
    is_whole: bool
    """Whether the whole is saved."""
    _gathered: Chunked | None = None

    def gather(self) -> Chunked:
        """Start to gather x [1, T, D], if it has not been started."""
        if self._gathered is None:
            port = replace(self.port, dim=None) if self.is_whole else self.port
            self._gathered = port.gather(self.saved, waits=False)
        return self._gathered


@dataclass
class _TokenOperands:
    """What the gradients of the tokens are computed from; G tensors each, one for each projection."""

    projections: Sequence[Pattention]
    x: _Input
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
    dx: Chunked | None = None
    """Set by the first half of backward, taken by `_Arrival`."""


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
        ranks: TensorRanks,
        handover: _Handover,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        first = projections[0]
        inward, outward = ranks.ports(part, first.message_chunks)
        x = inward.gather(part[None], waits=True)
        scores = _score(x, keys, first.products)
        reduce, _ = _reductions(first.norm, ranks.group)
        factor, weights = first.kernels.forward(
            first.norm, scores.flatten(0, 1), tau=_row_taus(scores, projections), reduce=reduce
        )
        weights = weights.view_as(scores)

        def mix(rows: slice, out: Tensor) -> None:
            for weight, value, out_g in zip(rows_of(weights, rows).unbind(), values, out.unbind(), strict=True):
                first.products.mix(weight, value, out=out_g)

        y = outward.reduce(mix, (len(values), values[0].shape[1]), like=part, waits=True)
        for i, projection in enumerate(projections):
            if projection.probe is not None:
                projection.probe.measure(weights[i], values[i])
        saved = x.tensor[0] if ranks.saves_whole else part
        ctx.save_for_backward(saved, factor, *([] if first.recompute_scores else [scores]), *keys, *values)
        ctx.projections, ctx.ranks, ctx.ports, ctx.handover = projections, ranks, (inward, outward), handover
        return y.wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        projections, ranks, handover = ctx.projections, ctx.ranks, ctx.handover
        edge = grads[0].new_empty(0) if ctx.needs_input_grad[1] else None
        rest = (None,) * 5
        if handover.operands is not None:  # the second pass of a split backward: the first one has computed dx
            return None, edge, *rest
        first, (inward, outward) = projections[0], ctx.ports
        saved_x, factor, *saved = ctx.saved_tensors
        x = _Input(saved_x[None], inward, ranks.saves_whole)
        dy = outward.gather(grads[0], waits=True)
        # private, but what torch's own register_multi_grad_hook asks
        tokens_are_next = edge is not None and torch._C._will_engine_execute_node(ctx.next_functions[1][0])
        if tokens_are_next:
            x.gather()  # it arrives during the products below
        tokens = saved if first.recompute_scores else saved[1:]
        keys, values = tokens[: len(projections)], tokens[len(projections) :]
        scores = _score(x.gather(), keys, first.products) if first.recompute_scores else saved[0]
        # one buffer for dP and then dA: the kernels may overwrite it
        grad = torch.empty_like(scores)
        for rows, dy_chunk in dy.chunks():
            for out, dy_g, value in zip(rows_of(grad, rows).unbind(), dy_chunk.unbind(), values, strict=True):
                first.products.mm(dy_g, value.t(), out=out, gradient="left")
        _, reduce = _reductions(first.norm, ranks.group)
        weights, d_scores = first.kernels.backward(
            first.norm,
            scores.flatten(0, 1),
            factor=factor,
            grad=grad.flatten(0, 1),
            tau=_row_taus(scores, projections),
            reduce=reduce,
        )
        operands = _TokenOperands(
            projections=projections,
            x=x,
            d_scores=d_scores.view_as(scores),
            d_values=None,
            weights=weights.view_as(scores),
            dy=dy.tensor,
        )

        def add_dx(rows: slice, out: Tensor) -> None:
            _input_gradient(operands, keys, rows, out[0])

        dx = inward.reduce(add_dx, (1, keys[0].shape[1]), like=grad, waits=False)
        if ranks.group is not None:
            handover.dx = dx
        if tokens_are_next:
            handover.operands = operands
        elif edge is not None and first.backward_split is not None:
            handover.operands = _kept_for_later(operands, first.backward_split)
            # autograd holds the scores until the second pass, which does not read them: the weights take their place
            scores.untyped_storage().resize_(0)
        return dx.tensor[0], edge, *rest


class _Arrival(torch.autograd.Function):
    """Passes x on; its backward waits for dx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handover: _Handover) -> Tensor:
        ctx.handover = handover
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        pending, ctx.handover.dx = ctx.handover.dx, None
        assert pending is not None, "the gradient of the input has been computed already"
        return pending.wait()[0], None


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
        d_values = operands.d_values or _value_gradients(operands)  # first, since x may still be on its way
        return None, *_key_gradients(operands), *d_values


def _kept_for_later(operands: _TokenOperands, split: BackwardSplit) -> _TokenOperands:
    """Return the operands as they are kept between two passes, without an x that was gathered."""
    kept = replace(operands, x=replace(operands.x, _gathered=None))
    return kept if split == "2:2" else replace(kept, d_values=_value_gradients(operands), weights=None, dy=None)


def _input_gradient(operands: _TokenOperands, keys: Sequence[Tensor], rows: slice, out: Tensor) -> None:
    """Write these rows of dx, this rank's partial sum, into out [rows, D]."""
    products = operands.projections[0].products
    d_first, *d_others = rows_of(operands.d_scores, rows).unbind()
    products.mm(d_first, keys[0], out=out, gradient="left")
    # accumulated: the projections share x, and one gradient for each would take G times the memory
    for d_score, key in zip(d_others, keys[1:], strict=True):
        products.add_mm(out, d_score, key, gradient="left")


def _key_gradients(operands: _TokenOperands) -> list[Tensor]:
    """Compute dK [n, D] of each projection."""
    mm, x = operands.projections[0].products.mm, operands.x.gather().wait()[0]
    return [mm(d_score.t(), x, gradient="left") for d_score in operands.d_scores.unbind()]


def _value_gradients(operands: _TokenOperands) -> list[Tensor]:
    """Compute dV [n, E] of each projection."""
    mm, weights, dy = operands.projections[0].products.mm, operands.weights, operands.dy
    assert weights is not None
    assert dy is not None
    return [mm(weight.t(), dy_g, gradient="right") for weight, dy_g in zip(weights.unbind(), dy.unbind(), strict=True)]
