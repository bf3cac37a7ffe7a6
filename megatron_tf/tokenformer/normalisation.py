"""The three normalisations: what happens between a Pattention's two matrix products, in PyTorch.

Shapes: R rows (one per token and projection), n parameter tokens held by this rank. Scores A [R, n]; a row's
statistic is summed over ranks by the caller, so every function here is local. With P the weights of the values:

    l2_norm_gelu   P = gelu(f A)          statistic sum A^2          f = tau / sqrt(statistic)
    gelu_l2_norm   P = f gelu(A)          statistic sum gelu(A)^2    f = tau / sqrt(statistic)
    softmax        P = exp(A + f)         statistic log sum exp(A)   f = log(tau) - statistic

The backward goes over the rows twice, around one more sum over ranks: `backward_activation` turns dP into the gradient
before the norm and gives each row's inner product c with it; `backward_norm` subtracts c's share and gives dA.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""A row's numbers [R] of this rank -> those of all tensor-parallel ranks together."""
EPSILON = 1e-12  # a row of zeros gives zeros instead of NaN; a row of ordinary size does not see it


@dataclass(frozen=True)
class Normalisation:
    """One way from scores to weights; the four functions take and give chunks of rows in accumulation type."""

    name: str
    """As in a configuration."""
    statistic: Callable[[Tensor], Tensor]
    """A [R, n] -> this rank's part of the statistic [R]."""
    is_logarithmic: bool
    """Whether statistics of ranks add as log-sum-exp instead of as a sum."""
    factor: Callable[[Tensor, Tensor], Tensor]
    """(statistic [R], tau [R]) -> f [R]."""
    weights: Callable[[Tensor, Tensor], Tensor]
    """(A [R, n], f [R, 1]) -> P [R, n]."""
    backward_activation: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(A, f, dP) -> (P, gradient before the norm, c [R])."""
    backward_norm: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(A, f, gradient before the norm, c / tau^p [R, 1]) -> dA, which may take the place of that gradient."""
    tau_power: int
    """The p in c / tau^p."""
    initial_tau: Callable[[int], float]
    """N -> the temperature tau of a new module of N parameter tokens."""


def _l2_factor(statistic: Tensor, tau: Tensor) -> Tensor:
    return tau * torch.rsqrt(statistic + EPSILON)


# aten's own gelu_backward: torch.nn.functional has no derivative of gelu, and autograd would run its forward again


def _l2_gelu_backward_activation(a: Tensor, f: Tensor, dp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u = a * f
    du = torch.ops.aten.gelu_backward(dp, u)
    return F.gelu(u), du, (du * u).sum(-1)


def _gelu_l2_backward_activation(a: Tensor, f: Tensor, dp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = F.gelu(a) * f
    return p, dp, (dp * p).sum(-1)


def _gelu_l2_backward_norm(a: Tensor, f: Tensor, dp: Tensor, share: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dp.addcmul_(F.gelu(a), f * share, value=-1).mul_(f), a)


def _softmax_backward_activation(a: Tensor, f: Tensor, dp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.exp(a + f)
    return p, dp, (dp * p).sum(-1)


NORMALISATIONS = {
    "l2_norm_gelu": Normalisation(
        name="l2_norm_gelu",
        statistic=lambda a: torch.linalg.vector_norm(a, dim=-1).square(),
        is_logarithmic=False,
        factor=_l2_factor,
        weights=lambda a, f: F.gelu(a * f),
        backward_activation=_l2_gelu_backward_activation,
        backward_norm=lambda a, f, du, share: du.mul_(f).addcmul_(a, f * f * share, value=-1),
        tau_power=2,
        initial_tau=math.sqrt,
    ),
    "gelu_l2_norm": Normalisation(
        name="gelu_l2_norm",
        statistic=lambda a: F.gelu(a).square().sum(-1),
        is_logarithmic=False,
        factor=_l2_factor,
        weights=lambda a, f: F.gelu(a) * f,
        backward_activation=_gelu_l2_backward_activation,
        backward_norm=_gelu_l2_backward_norm,
        tau_power=2,
        initial_tau=math.sqrt,
    ),
    "softmax": Normalisation(
        name="softmax",
        statistic=lambda a: torch.logsumexp(a, -1),
        is_logarithmic=True,
        factor=lambda statistic, tau: torch.log(tau) - statistic,
        weights=lambda a, f: torch.exp(a + f),
        backward_activation=_softmax_backward_activation,
        backward_norm=lambda a, f, dp, share: dp.sub_(share).mul_(torch.exp(a + f)),
        tau_power=1,
        initial_tau=float,
    ),
}


def accumulation_type(x: Tensor) -> torch.dtype:
    """What statistics and elementwise arithmetic are done in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)
