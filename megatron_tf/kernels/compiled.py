"""Between a Pattention's products through torch.compile: inductor fuses each pass over the scores into one kernel."""

import functools
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.tokenformer.normalisation import NORMALISATIONS, Normalisation, Reduce, accumulation_type

T = TypeVar("T")


class CompiledKernels(PattentionKernels):
    """See PattentionKernels. The first call of each shape compiles, which takes seconds; results are cached on disk."""

    name: ClassVar[str] = "compiled"

    def forward(
        self, norm: Normalisation, scores: Tensor, *, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """See PattentionKernels."""
        tau = tau.to(accumulation_type(scores))
        if reduce is None:
            return _compiled(_forward, norm.name)(scores, tau)
        statistic = reduce(_compiled(_statistic, norm.name)(scores))
        return _compiled(_weights, norm.name)(scores, statistic=statistic, tau=tau)

    def backward(
        self, norm: Normalisation, scores: Tensor, *, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """See PattentionKernels."""
        scale = tau.to(factor.dtype) ** -norm.tau_power
        if reduce is None:
            return _compiled(_backward, norm.name)(scores, factor=factor, grad=grad, scale=scale)
        weights, before, inner = _compiled(_backward_activation, norm.name)(scores, factor=factor, grad=grad)
        share = reduce(inner) * scale
        return weights, _compiled(_backward_norm, norm.name)(scores, factor=factor, before=before, share=share)


@functools.cache
def _compiled(function: Callable[..., T], norm_name: str) -> Callable[..., T]:
    compiled: Callable[..., T] = torch.compile(function, fullgraph=True)
    return functools.partial(compiled, NORMALISATIONS[norm_name])


def _statistic(norm: Normalisation, scores: Tensor) -> Tensor:
    return norm.statistic(scores.to(accumulation_type(scores)))


def _weights(norm: Normalisation, scores: Tensor, *, statistic: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    factor = norm.factor(statistic, tau)
    return factor, norm.weights(scores.to(factor.dtype), factor[:, None]).to(scores.dtype)


def _forward(norm: Normalisation, scores: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    return _weights(norm, scores, statistic=_statistic(norm, scores), tau=tau)


def _backward_activation(
    norm: Normalisation, scores: Tensor, *, factor: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = factor.dtype
    weights, before, inner = norm.backward_activation(scores.to(wide), factor[:, None], grad.to(wide))
    return weights.to(scores.dtype), before.to(scores.dtype), inner


def _backward_norm(norm: Normalisation, scores: Tensor, *, factor: Tensor, before: Tensor, share: Tensor) -> Tensor:
    wide = factor.dtype
    # copied, as backward_norm writes over it, and what is given to a graph belongs to the caller
    return norm.backward_norm(scores.to(wide), factor[:, None], before.to(wide, copy=True), share[:, None]).to(
        scores.dtype
    )


def _backward(
    norm: Normalisation, scores: Tensor, *, factor: Tensor, grad: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    wide = factor.dtype
    chunk, f = scores.to(wide), factor[:, None]
    weights, before, inner = norm.backward_activation(chunk, f, grad.to(wide, copy=True))
    return weights.to(scores.dtype), norm.backward_norm(chunk, f, before, (inner * scale)[:, None]).to(scores.dtype)
