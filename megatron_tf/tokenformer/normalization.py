"""The three normalizations of a Pattention's scores into weights of its values, in PyTorch.

Shapes: R rows (one per token and projection), n parameter tokens held by this rank, scores A [R, n], weights P [R, n].
The caller sums a row's statistic over the ranks, so every function here is local.

    l2_norm_gelu   P = gelu(f A)          statistic sum A^2          f = tau / sqrt(statistic)
    gelu_l2_norm   P = f gelu(A)          statistic sum gelu(A)^2    f = tau / sqrt(statistic)
    softmax        P = exp(A + f)         statistic log sum exp(A)   f = log(tau) - statistic

Backward passes over the rows twice, with one sum over ranks in between: `backward_activation` turns dP into the
gradient before the norm and returns each row's inner product c with it; `backward_norm` subtracts the part of the
gradient that c accounts for and returns dA.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""One number per row [R] of this rank -> the same combined over all tensor-parallel ranks."""
# added to the squared norm of a row: one of zeros gives zeros instead of NaN, and no other row is affected
EPSILON = 1e-12
_EPSILON_FP64 = 1e-24


@dataclass(frozen=True)
class Normalization:
    """One way to turn scores into weights; its functions take and return chunks of rows in the accumulation dtype."""

    name: str
    """The value of `model.norm_activation`."""
    statistic: Callable[[Tensor], Tensor]
    """A [R, n] -> this rank's part of the statistic [R]."""
    is_logarithmic: bool
    """Whether ranks combine their statistics by log-sum-exp rather than by a sum."""
    factor: Callable[[Tensor, Tensor], Tensor]
    """(statistic [R], tau [R]) -> f [R]."""
    weights: Callable[[Tensor, Tensor], Tensor]
    """(A [R, n], f [R, 1]) -> P [R, n]."""
    backward_activation: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(A, f, dP) -> (P, gradient before the norm, c [R])."""
    backward_norm: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(A, f, gradient before the norm, c / tau^p [R, 1]) -> dA, which may overwrite that gradient."""
    tau_power: int
    """The p in c / tau^p."""
    initial_tau: Callable[[int], float]
    """N -> the initial temperature tau of a module with N parameter tokens."""

    def __reduce__(self) -> tuple[Callable[[str], "Normalization"], tuple[str]]:
        """Pickle it by its name, so that modules can be pickled."""
        return _named, (self.name,)


def _named(name: str) -> Normalization:
    return NORMALIZATIONS[name]


def _l2_factor(statistic: Tensor, tau: Tensor) -> Tensor:
    epsilon = _EPSILON_FP64 if statistic.dtype == torch.float64 else EPSILON
    return tau * torch.rsqrt(statistic + epsilon)


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


NORMALIZATIONS = {
    "l2_norm_gelu": Normalization(
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
    "gelu_l2_norm": Normalization(
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
    "softmax": Normalization(
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
