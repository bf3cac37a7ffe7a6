"""Rows of scores on which kernels go wrong first, and what a Pattention makes of them in float64 by autograd."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest error relative to the largest term of a row: one or two units in the last place of a 16-bit type, which
Triton's interpreter truncates, and some of a wide one."""
LENGTHS = 1, 37, 576, 2140, 8193, 65536
"""One column; not a power of 2, nor a multiple of 8, nor of a block; the longest rows."""


def hard_rows(n):
    """Scores [9, n] in fp64: ordinary ones, all far below and far above zero, of both signs, and all equal; of long
    rows only the first three."""
    levels = torch.tensor([0, -1e4, 1e4, -1e2, 1e2, 0, 0, 0.7, 0], dtype=torch.float64)
    spreads = torch.tensor([1, 1, 1, 1, 1, 1e2, 1e4, 0, 0], dtype=torch.float64)
    rows = 3 if n > 10000 else 9
    noise = torch.randn(rows, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return levels[:rows, None] + spreads[:rows, None] * noise


@dataclass
class Case:
    """Scores and the gradient of their weights, as kernels get them, and what is right in float64."""

    scores: torch.Tensor
    grad: torch.Tensor
    tau: torch.Tensor
    weights: torch.Tensor
    d_scores: torch.Tensor
    term: torch.Tensor
    """Size [R, 1] of the terms whose difference a row's gradient is."""
    exponent: torch.Tensor
    """Largest argument [R, 1] of an exponential, which is rounded before; 0 where there is none."""


def hard_case(norm, n, dtype):
    """The hard rows of n tokens, rounded to a type."""
    scores = hard_rows(n).to(dtype)
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(n + 1)).to(dtype)
    tau = torch.full(scores.shape[:1], n**0.5, dtype=torch.float64)
    wide, dp = scores.double().clone().requires_grad_(), grad.double()
    epsilon = 1e-24 if dtype == torch.float64 else 1e-12
    weights = formula(norm, wide, tau[:, None], epsilon=epsilon)
    (d_scores,) = torch.autograd.grad(weights, wide, dp)
    weights, wide = weights.detach(), wide.detach()
    if norm == "softmax":
        term = weights.amax(1, keepdim=True) * dp.abs().amax(1, keepdim=True)
        exponent = wide.abs().amax(1, keepdim=True)
    else:
        norms = (F.gelu(wide) if norm == "gelu_l2_norm" else wide).norm(dim=1, keepdim=True)
        term = tau[:, None] / norms.clamp(min=epsilon**0.5) * dp.norm(dim=1, keepdim=True)
        exponent = torch.zeros_like(term)
    return Case(scores, grad, tau, weights, d_scores, term, exponent)


def formula(norm, a, tau, *, epsilon):
    """P of scores A, as Pattention's docstring has it; `epsilon` is added to the squared norm of a row."""
    if norm == "softmax":
        return tau * torch.softmax(a, -1)
    if norm == "gelu_l2_norm":
        g = F.gelu(a)
        return tau * g / (g.square().sum(-1, keepdim=True) + epsilon).sqrt()
    return F.gelu(tau * a / (a.square().sum(-1, keepdim=True) + epsilon).sqrt())


def check_kernels(kernels, norm, n, dtype, *, reduce=None, lost_per_token=0.0):
    """Compare forward and backward of kernels with float64, each row by its own measure.

    `lost_per_token` is added to the tolerance for each token of a row, where a sum over it is made in order.
    """
    case = hard_case(norm.name, n, dtype)
    factor, weights = kernels.forward(norm, case.scores, tau=case.tau, reduce=reduce)
    again, d_scores = kernels.backward(
        norm, case.scores, factor=factor, grad=case.grad.clone(), tau=case.tau, reduce=reduce
    )
    assert weights.dtype == d_scores.dtype == dtype
    assert torch.equal(again, weights)
    # e^x of an x that is rounded has an error of x units in the last place
    unit = 2**-53 if dtype == torch.float64 else 2**-24
    tolerance = ROUNDING[dtype] + 2 * unit * case.exponent + n * lost_per_token
    size = case.weights.abs().amax(1, keepdim=True)
    assert ((weights.double() - case.weights).abs() <= tolerance * size).all()
    # the gradient of a row of zeros is 1e6 and more, which fp16 does not hold
    fits = (case.term < torch.finfo(dtype).max)[:, 0]
    assert ((d_scores.double() - case.d_scores).abs() <= tolerance * case.term)[fits].all()
