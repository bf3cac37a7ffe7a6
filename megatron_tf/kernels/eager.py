"""Pattention kernels in eager PyTorch; on a CPU, rows are processed in chunks that fit into its cache."""

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.tokenformer.dtypes import wide_dtype
from megatron_tf.tokenformer.normalization import Normalization, Reduce

# elements of a chunk on a CPU: 2 MB in fp32. Half and twice this size are as fast, an eighth is 1.1 times slower.
_CACHED_ELEMENTS = 1 << 19
# A CPU sums this many tokens at a time, and the remainder in a different order. Rows are padded with zeros to a
# multiple of it, so that appending zero keys never changes the order in which the old tokens are summed.
_SUMMED_TOGETHER = 32


class EagerKernels(PattentionKernels):
    """Kernels that run everywhere and in every dtype: the reference for the others."""

    name: ClassVar[str] = "eager"

    def forward(
        self, norm: Normalization, scores: Tensor, *, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(scores.dtype)
        tau = tau.to(wide)
        chunks = list(_row_chunks(scores))
        if reduce is None and len(chunks) == 1:  # as always on a GPU: the buffers below would cost copies
            chunk = scores.to(wide)
            factor = norm.factor(_statistic(norm, chunk), tau)
            return factor, norm.weights(chunk, factor[:, None]).to(scores.dtype)
        statistic = scores.new_empty(scores.shape[0], dtype=wide)
        factor, weights = torch.empty_like(statistic), torch.empty_like(scores)
        if reduce is not None:
            for rows in chunks:
                statistic[rows] = _statistic(norm, scores[rows].to(wide))
            statistic = reduce(statistic)
        for rows in chunks:
            chunk = scores[rows].to(wide)
            factor[rows] = norm.factor(statistic[rows] if reduce is not None else _statistic(norm, chunk), tau[rows])
            weights[rows] = norm.weights(chunk, factor[rows, None])
        return factor, weights

    def backward(
        self, norm: Normalization, scores: Tensor, *, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
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


def _statistic(norm: Normalization, chunk: Tensor) -> Tensor:
    """Return the statistic of the chunk's rows; on a CPU, trailing tokens of score zero do not change a single bit."""
    missing = -chunk.shape[1] % _SUMMED_TOGETHER
    if not missing or norm.is_logarithmic or chunk.device.type != "cpu":
        return norm.statistic(chunk)
    return norm.statistic(F.pad(chunk, (0, missing)))


def _row_chunks(scores: Tensor) -> Iterator[slice]:
    rows, columns = scores.shape
    step = max(1, _CACHED_ELEMENTS // max(columns, 1)) if scores.device.type == "cpu" else max(rows, 1)
    return (slice(start, start + step) for start in range(0, rows, step))
