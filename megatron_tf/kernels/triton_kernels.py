"""Between a Pattention's products in Triton: a program for each row of scores, arithmetic in fp32.

A row that fits is read once, on the way forward and on the way back; a longer one, or one that is shared by ranks, is
read twice each way. With R rows of n tokens, forward moves at least 2 R n elements and backward 4 R n, which bounds it.
"""

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.tokenformer.normalisation import EPSILON, Normalisation, Reduce

LARGEST_ROW = 16384
"""Tokens of a row that is held in registers; beyond, rows go in blocks."""
_BLOCK = 4096
_NORMS = {"l2_norm_gelu": 0, "gelu_l2_norm": 1, "softmax": 2}


class TritonKernels(PattentionKernels):
    """See PattentionKernels; fp64 is left to the eager kernels."""

    name: ClassVar[str] = "triton"

    def forward(
        self, norm: Normalisation, scores: Tensor, *, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """See PattentionKernels."""
        if scores.dtype == torch.float64:
            return EagerKernels().forward(norm, scores, tau=tau, reduce=reduce)
        rows, n = scores.shape
        tau = tau.to(torch.float32)
        factor = torch.empty_like(tau)
        weights = torch.empty_like(scores)
        if reduce is None and n <= LARGEST_ROW:
            forward_row[(rows,)](scores, tau, factor, weights, epsilon=EPSILON, **_options(norm, n, LARGEST_ROW))
            return factor, weights
        statistic = torch.empty_like(tau)
        options = _options(norm, n, _BLOCK)
        statistic_row[(rows,)](scores, statistic, **options)
        factor = norm.factor(statistic if reduce is None else reduce(statistic), tau)
        grid = (rows, triton.cdiv(n, options["BLOCK"]))
        weights_block[grid](scores, factor, weights, **options)
        return factor, weights

    def backward(
        self, norm: Normalisation, scores: Tensor, *, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """See PattentionKernels."""
        if scores.dtype == torch.float64:
            return EagerKernels().backward(norm, scores, factor=factor, grad=grad, tau=tau, reduce=reduce)
        rows, n = scores.shape
        scale = tau.to(torch.float32) ** -norm.tau_power
        weights = torch.empty_like(scores)
        if reduce is None and n <= LARGEST_ROW:
            backward_row[(rows,)](scores, factor, grad, scale, weights, **_options(norm, n, LARGEST_ROW))
            return weights, grad
        inner = torch.empty_like(factor)
        options = _options(norm, n, _BLOCK)
        backward_activation_row[(rows,)](scores, factor, grad, weights, inner, **options)
        share = (inner if reduce is None else reduce(inner)) * scale
        grid = (rows, triton.cdiv(n, options["BLOCK"]))
        backward_norm_block[grid](scores, factor, grad, share, **options)
        return weights, grad


def _options(norm: Normalisation, n: int, largest: int) -> dict[str, int]:
    """What kernels over rows of n tokens are compiled for: the norm, and blocks of at most `largest` elements."""
    # NORM is a constant, so that its branches cost nothing; a warp of 32 threads has 512 elements, 16 in each
    block = min(largest, triton.next_power_of_2(n))
    return {"n": n, "NORM": _NORMS[norm.name], "BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_derivative(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _weights(a, f, NORM: tl.constexpr):
    if NORM == 0:
        p = _gelu(a * f)
    elif NORM == 1:
        p = _gelu(a) * f
    else:
        p = tl.exp(a + f)
    return p


@triton.jit
def _before_norm(a, f, dp, p, NORM: tl.constexpr):
    """The gradient before the norm, and the terms of its inner product c."""
    if NORM == 0:
        du = dp * _gelu_derivative(a * f)
        terms = du * (a * f)
    else:
        du = dp
        terms = dp * p
    return du, terms


@triton.jit
def _after_norm(a, f, du, share, p, NORM: tl.constexpr):
    """The gradient of the scores."""
    if NORM == 0:
        da = (du - a * (f * share)) * f
    elif NORM == 1:
        da = (du - _gelu(a) * (f * share)) * f * _gelu_derivative(a)
    else:
        da = p * (du - share)
    return da


@triton.jit
def forward_row(
    scores, tau, factor, weights, n: tl.constexpr, epsilon: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Statistic, factor and weights of one row that fits."""
    row = tl.program_id(0).to(tl.int64)  # row * n passes 2^31 in a large micro-batch
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    a = tl.load(scores + row * n + columns, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(tau + row)
    # columns outside are 0 and add nothing to a norm; softmax masks them, as exp(0) is 1
    if NORM == 0:
        f = t / tl.sqrt(tl.sum(a * a, 0) + epsilon)
    elif NORM == 1:
        g = _gelu(a)
        f = t / tl.sqrt(tl.sum(g * g, 0) + epsilon)
    else:
        highest = tl.max(tl.where(inside, a, -float("inf")), 0)
        f = tl.log(t) - highest - tl.log(tl.sum(tl.where(inside, tl.exp(a - highest), 0.0), 0))
    tl.store(factor + row, f)
    tl.store(weights + row * n + columns, _weights(a, f, NORM), mask=inside)


@triton.jit
def statistic_row(scores, statistic, n: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """This rank's part of one row's statistic."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < n
        a = tl.load(scores + row * n + columns, mask=inside, other=0.0).to(tl.float32)
        if NORM == 0:
            total += a * a
        elif NORM == 1:
            g = _gelu(a)
            total += g * g
        else:
            # the first block has no column outside, unless it is the only one: then those count for nothing
            new = tl.maximum(highest, tl.where(inside, a, -float("inf")))
            kept = tl.where(highest == new, 1.0, tl.exp(highest - new))
            total = total * kept + tl.where(inside, tl.exp(a - new), 0.0)
            highest = new
    if NORM == 2:
        top = tl.max(highest, 0)
        result = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    else:
        result = tl.sum(total, 0)
    tl.store(statistic + row, result)


@triton.jit
def weights_block(scores, factor, weights, n: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Weights of one block of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    a = tl.load(scores + row * n + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(weights + row * n + columns, _weights(a, tl.load(factor + row), NORM), mask=inside)


@triton.jit
def backward_row(scores, factor, grad, scale, weights, n: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Weights again and gradient of the scores of one row that fits; the gradient goes over that of the weights."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    place = row * n + columns
    a = tl.load(scores + place, mask=inside, other=0.0).to(tl.float32)
    dp = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(factor + row)
    # weights are computed again: the scores are read anyway, and to keep both takes twice the memory
    p = _weights(a, f, NORM)
    # outside dp is 0, and with it every term
    du, terms = _before_norm(a, f, dp, p, NORM)
    share = tl.sum(terms, 0) * tl.load(scale + row)
    tl.store(weights + place, p, mask=inside)
    tl.store(grad + place, _after_norm(a, f, du, share, p, NORM), mask=inside)


@triton.jit
def backward_activation_row(
    scores, factor, grad, weights, inner, n: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Weights again, and this rank's part of one row's inner product."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.load(factor + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < n
        place = row * n + columns
        a = tl.load(scores + place, mask=inside, other=0.0).to(tl.float32)
        dp = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        p = _weights(a, f, NORM)
        _, terms = _before_norm(a, f, dp, p, NORM)
        total += terms
        tl.store(weights + place, p, mask=inside)
    tl.store(inner + row, tl.sum(total, 0))


@triton.jit
def backward_norm_block(scores, factor, grad, share, n: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of one block of a row's scores, over that of the weights."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    place = row * n + columns
    a = tl.load(scores + place, mask=inside, other=0.0).to(tl.float32)
    dp = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(factor + row)
    # not read from the weights that the first pass wrote: memory is what bounds this kernel, not arithmetic
    p = _weights(a, f, NORM)
    du, _ = _before_norm(a, f, dp, p, NORM)
    tl.store(grad + place, _after_norm(a, f, du, tl.load(share + row), p, NORM), mask=inside)
