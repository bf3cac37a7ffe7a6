"""Pattention kernels through torch.compile: inductor fuses each pass over the scores into one kernel."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.tokenformer.dtypes import wide_dtype
from megatron_tf.tokenformer.normalization import NORMALIZATIONS, Normalization, Reduce

T = TypeVar("T")


class CompiledKernels(PattentionKernels):
    """Kernels that inductor generates.

    The first call with each shape compiles for seconds; inductor caches the result on disk.
    """

    name: ClassVar[str] = "compiled"

    def forward(
        self, norm: Normalization, scores: Tensor, *, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        tau = tau.to(wide_dtype(scores.dtype))
        if reduce is None:
            return _compiled(_forward, norm.name)(scores, tau)
        statistic = reduce(_compiled(_statistic, norm.name)(scores))
        return _compiled(_weights, norm.name)(scores, statistic=statistic, tau=tau)

    def backward(
        self, norm: Normalization, scores: Tensor, *, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        scale = tau.to(factor.dtype) ** -norm.tau_power
        if reduce is None:
            return _compiled(_backward, norm.name)(scores, factor=factor, grad=grad, scale=scale)
        weights, before, inner = _compiled(_backward_activation, norm.name)(scores, factor=factor, grad=grad)
        share = reduce(inner) * scale
        return weights, _compiled(_backward_norm, norm.name)(scores, factor=factor, before=before, share=share)


@functools.cache
def _compiled(function: Callable[..., T], norm_name: str) -> Callable[..., T]:
    # a copy for each normalization, because torch limits how often the code of one function is compiled
    copy = FunctionType(function.__code__.replace(), function.__globals__, f"{function.__name__}_{norm_name}")
    compiled: Callable[..., T] = torch.compile(copy, fullgraph=True)
    return functools.partial(compiled, NORMALIZATIONS[norm_name])


def _statistic(norm: Normalization, scores: Tensor) -> Tensor:
    return norm.statistic(scores.to(wide_dtype(scores.dtype)))


def _weights(norm: Normalization, scores: Tensor, *, statistic: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    factor = norm.factor(statistic, tau)
    return factor, norm.weights(scores.to(factor.dtype), factor[:, None]).to(scores.dtype)


def _forward(norm: Normalization, scores: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    return _weights(norm, scores, statistic=_statistic(norm, scores), tau=tau)


def _backward_activation(
    norm: Normalization, scores: Tensor, *, factor: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = factor.dtype
    weights, before, inner = norm.backward_activation(scores.to(wide), factor[:, None], grad.to(wide))
    return weights.to(scores.dtype), before.to(scores.dtype), inner


def _backward_norm(norm: Normalization, scores: Tensor, *, factor: Tensor, before: Tensor, share: Tensor) -> Tensor:
    wide = factor.dtype
    # a copy: backward_norm overwrites it, and a compiled graph must not modify its caller's inputs
    return norm.backward_norm(scores.to(wide), factor[:, None], before.to(wide, copy=True), share[:, None]).to(
        scores.dtype
    )


def _backward(
    norm: Normalization, scores: Tensor, *, factor: Tensor, grad: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    wide = factor.dtype
    chunk, f = scores.to(wide), factor[:, None]
    weights, before, inner = norm.backward_activation(chunk, f, grad.to(wide, copy=True))
    return weights.to(scores.dtype), norm.backward_norm(chunk, f, before, (inner * scale)[:, None]).to(scores.dtype)
