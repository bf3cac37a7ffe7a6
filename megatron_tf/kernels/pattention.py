"""What happens between a Pattention's two matrix products: DESIGN of the three normalisations, eager PyTorch.

Shapes: R rows (one per token and projection), n parameter tokens held by this rank. Scores A [R, n]; a row's
statistic is summed over ranks by the caller, so every function here is local. With P the weights of the values:

    l2_norm_gelu   P = gelu(f A)          statistic sum A^2          f = tau / sqrt(statistic)
    gelu_l2_norm   P = f gelu(A)          statistic sum gelu(A)^2    f = tau / sqrt(statistic)
    softmax        P = exp(A + f)         statistic log sum exp(A)   f = log(tau) - statistic

The backward runs twice over the rows, around one more sum over ranks: `first` turns dP into the gradient before the
norm and gives each row's inner product c with it; `second` subtracts c's share and gives dA. Both work in place on
dP. Rows go in chunks that stay in the cache; arithmetic is in fp32 (fp64 for fp64 scores).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-12  # a row of zeros gives zeros instead of NaN; a row of ordinary size does not see it
_TOKENS_PER_BLOCK = 128  # a BLAS may sum fewer tokens in another order when more follow; it was seen above 128
_CACHED_ELEMENTS = 1 << 17  # elements of a chunk on a CPU: a few fp32 temporaries of this size fit in L2


@dataclass(frozen=True)
class Normalisation:
    """One way from scores to weights; the four functions take and give chunks of rows in accumulation type."""

    statistic: Callable[[Tensor], Tensor]
    """A [R, n] -> this rank's part of the statistic [R]."""
    is_logarithmic: bool
    """Whether statistics of ranks add as log-sum-exp instead of as a sum."""
    factor: Callable[[Tensor, Tensor], Tensor]
    """(statistic [R], tau [R]) -> f [R]."""
    weights: Callable[[Tensor, Tensor], Tensor]
    """(A [R, n], f [R, 1]) -> P [R, n]."""
    first: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(A, f, dP) -> (P, gradient before the norm, c [R])."""
    second: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(A, f, gradient before the norm, c / tau^p [R, 1]) -> dA."""
    tau_power: int
    """The p in c / tau^p."""
    tau_at_birth: Callable[[int], float]
    """N -> tau of a new module of N parameter tokens."""


def _l2_factor(statistic: Tensor, tau: Tensor) -> Tensor:
    return tau * torch.rsqrt(statistic + _EPSILON)


def _l2_gelu_first(a: Tensor, f: Tensor, dp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u = a * f
    du = torch.ops.aten.gelu_backward(dp, u)
    return F.gelu(u), du, (du * u).sum(-1)


def _gelu_l2_first(a: Tensor, f: Tensor, dp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = F.gelu(a) * f
    return p, dp, (dp * p).sum(-1)


def _gelu_l2_second(a: Tensor, f: Tensor, dp: Tensor, share: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward((dp - F.gelu(a) * (f * share)) * f, a)


def _softmax_first(a: Tensor, f: Tensor, dp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.exp(a + f)
    return p, dp, (dp * p).sum(-1)


NORMALISATIONS = {
    "l2_norm_gelu": Normalisation(
        statistic=lambda a: (a * a).sum(-1),
        is_logarithmic=False,
        factor=_l2_factor,
        weights=lambda a, f: F.gelu(a * f),
        first=_l2_gelu_first,
        second=lambda a, f, du, share: (du - a * (f * share)) * f,
        tau_power=2,
        tau_at_birth=math.sqrt,
    ),
    "gelu_l2_norm": Normalisation(
        statistic=lambda a: F.gelu(a).square().sum(-1),
        is_logarithmic=False,
        factor=_l2_factor,
        weights=lambda a, f: F.gelu(a) * f,
        first=_gelu_l2_first,
        second=_gelu_l2_second,
        tau_power=2,
        tau_at_birth=math.sqrt,
    ),
    "softmax": Normalisation(
        statistic=lambda a: torch.logsumexp(a, -1),
        is_logarithmic=True,
        factor=lambda statistic, tau: torch.log(tau) - statistic,
        weights=lambda a, f: torch.exp(a + f),
        first=_softmax_first,
        second=lambda a, f, dp, share: torch.exp(a + f) * (dp - share),
        tau_power=1,
        tau_at_birth=float,
    ),
}


def row_statistic(norm: Normalisation, scores: Tensor) -> Tensor:
    """This rank's part of each row's statistic: [R] in accumulation type."""
    statistic = scores.new_empty(scores.shape[0], dtype=_accumulation_type(scores))
    for rows in _row_chunks(scores):
        statistic[rows] = norm.statistic(_widen(scores[rows]))
    return statistic


def value_weights(norm: Normalisation, scores: Tensor, factor: Tensor) -> Tensor:
    """P [R, n] in the type of the scores; `factor` is [R]."""
    weights = torch.empty_like(scores)
    for rows in _row_chunks(scores):
        weights[rows] = norm.weights(_widen(scores[rows]), factor[rows, None])
    return weights


def mix_values(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """out [R, E] = P [R, n] @ values [n, E]; in fp32 and fp64 on a CPU, tokens of weight zero change no bit of it.

    There, blocks of tokens are summed one after another, which growth by zero keys leaves as they are.
    """
    if weights.device.type != "cpu" or weights.dtype not in (torch.float32, torch.float64):
        torch.mm(weights, values, out=out)
        return
    blocks = zip(weights.split(_TOKENS_PER_BLOCK, 1), values.split(_TOKENS_PER_BLOCK), strict=True)
    torch.mm(*next(blocks), out=out)
    for weight, value in blocks:
        out.addmm_(weight, value)


def backward_first(norm: Normalisation, scores: Tensor, factor: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(P [R, n], this rank's part of c [R]); `grad` [R, n] goes in as dP and becomes the gradient before the norm."""
    weights = torch.empty_like(scores)
    inner = torch.empty_like(factor)
    for rows in _row_chunks(scores):
        weights[rows], grad[rows], inner[rows] = norm.first(
            _widen(scores[rows]), factor[rows, None], _widen(grad[rows])
        )
    return weights, inner


def backward_second(norm: Normalisation, scores: Tensor, factor: Tensor, grad: Tensor, share: Tensor) -> None:
    """`grad` [R, n] goes in as `backward_first` left it and becomes dA; `share` is c / tau^p [R]."""
    for rows in _row_chunks(scores):
        grad[rows] = norm.second(_widen(scores[rows]), factor[rows, None], _widen(grad[rows]), share[rows, None])


def _row_chunks(scores: Tensor) -> Iterator[slice]:
    rows, columns = scores.shape
    step = max(1, _CACHED_ELEMENTS // max(columns, 1)) if scores.device.type == "cpu" else max(rows, 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def _accumulation_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _widen(x: Tensor) -> Tensor:
    return x.to(_accumulation_type(x))
