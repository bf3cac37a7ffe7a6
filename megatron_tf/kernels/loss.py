"""Elementwise passes of the cross-entropy over logits: statistics of each row, and the gradient, in place."""

from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megatron_tf.tokenformer.dtypes import wide_dtype

# per chunk on a CPU: 2 MB in fp32, which fits in the cache
_CACHED_ELEMENTS = 1 << 19


class LossKernels(Protocol):
    """Passes over logits [T, n] of n ids of the vocabulary; targets [T] are indices of these, or -1 for other ids."""

    name: ClassVar[str]
    """The choice of `kernels.pattention` that selects these kernels."""

    def statistics(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's log-sum-exp [T] and the logit of its target [T], 0 for a target of -1.

        Both are in fp32, or in fp64 for fp64.
        """

    def gradient(self, logits: Tensor, targets: Tensor, *, log_total: Tensor, scale: Tensor) -> None:
        """Overwrite the logits with their gradient: the softmax, minus 1 at the target, times scale [T].

        `log_total` [T] is the log-sum-exp over the whole vocabulary, of which other ranks may hold a part.
        """


class EagerLoss(LossKernels):
    """Eager PyTorch kernels; on a CPU in chunks of rows that fit in its cache."""

    name: ClassVar[str] = "eager"

    def statistics(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(logits.dtype)
        log_total = logits.new_empty(len(logits), dtype=wide)
        for rows in _row_chunks(logits):
            highest = logits[rows].amax(-1).to(wide)
            total = logits[rows].to(wide, copy=True).sub_(highest[:, None]).exp_().sum(-1)
            log_total[rows] = total.log_().add_(highest)
        chosen = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        return log_total, chosen.to(wide).masked_fill_(targets < 0, 0.0)

    def gradient(self, logits: Tensor, targets: Tensor, *, log_total: Tensor, scale: Tensor) -> None:
        minus_one = -(targets >= 0).to(log_total.dtype)[:, None]
        columns = targets.clamp(min=0)[:, None]
        for rows in _row_chunks(logits):
            softmax = logits[rows].to(log_total.dtype).sub_(log_total[rows, None]).exp_()  # fp32: in place
            softmax.scatter_add_(-1, columns[rows], minus_one[rows])
            torch.mul(softmax, scale[rows, None], out=logits[rows])


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    step = max(1, _CACHED_ELEMENTS // columns) if logits.device.type == "cpu" else max(1, rows)
    return (slice(start, start + step) for start in range(0, rows, step))
