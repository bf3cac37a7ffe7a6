"""A Pattention in eager PyTorch: on a CPU, rows go in chunks that its cache holds."""

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.tokenformer.normalisation import Normalisation, Reduce, accumulation_type

# of a chunk on a CPU: 2 MB in fp32; half and twice as many were as fast, an eighth 1.1 times as slow
_CACHED_ELEMENTS = 1 << 19
# A CPU sums so many tokens at a time, and what is left over in another order: completed with zeros, which add nothing
# to a norm, there is nothing left over, and growth by zero keys leaves the order of the old tokens as it is.
_SUMMED_TOGETHER = 32


class EagerKernels(PattentionKernels):
    """See PattentionKernels."""

    name: ClassVar[str] = "eager"

    def forward(
        self, norm: Normalisation, scores: Tensor, *, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """See PattentionKernels."""
        wide = accumulation_type(scores)
        statistic = scores.new_empty(scores.shape[0], dtype=wide)
        factor, weights = torch.empty_like(statistic), torch.empty_like(scores)
        tau = tau.to(wide)
        if reduce is not None:
            for rows in _row_chunks(scores):
                statistic[rows] = _statistic(norm, scores[rows].to(wide))
            statistic = reduce(statistic)
        for rows in _row_chunks(scores):
            chunk = scores[rows].to(wide)
            factor[rows] = norm.factor(statistic[rows] if reduce is not None else _statistic(norm, chunk), tau[rows])
            weights[rows] = norm.weights(chunk, factor[rows, None])
        return factor, weights

    def backward(
        self, norm: Normalisation, scores: Tensor, *, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """See PattentionKernels."""
        wide = factor.dtype
        weights, inner = torch.empty_like(scores), torch.empty_like(factor)
        scale = tau.to(wide) ** -norm.tau_power
        for rows in _row_chunks(scores):
            chunk, f = scores[rows].to(wide), factor[rows, None]
            weights[rows], before, inner[rows] = norm.backward_activation(chunk, f, grad[rows].to(wide))
            if reduce is None:
                before = norm.backward_norm(chunk, f, before, (inner[rows] * scale[rows])[:, None])
            grad[rows] = before
        if reduce is not None:
            share = reduce(inner) * scale
            for rows in _row_chunks(scores):
                chunk, f = scores[rows].to(wide), factor[rows, None]
                grad[rows] = norm.backward_norm(chunk, f, grad[rows].to(wide), share[rows, None])
        return weights, grad


def _statistic(norm: Normalisation, chunk: Tensor) -> Tensor:
    """Of the chunk's rows; on a CPU tokens of score zero at the end change no bit of a norm."""
    missing = -chunk.shape[1] % _SUMMED_TOGETHER
    if not missing or norm.is_logarithmic or chunk.device.type != "cpu":
        return norm.statistic(chunk)
    return norm.statistic(F.pad(chunk, (0, missing)))


def _row_chunks(scores: Tensor) -> Iterator[slice]:
    rows, columns = scores.shape
    step = max(1, _CACHED_ELEMENTS // max(columns, 1)) if scores.device.type == "cpu" else max(rows, 1)
    return (slice(start, start + step) for start in range(0, rows, step))
