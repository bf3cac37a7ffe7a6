"""Cross-entropy over logits in Triton, with fp32 arithmetic: one pass reads the logits, one overwrites them."""

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tf.kernels.loss import EagerLoss, LossKernels
from megatron_tf.kernels.triton_programs import fast_exp

_BLOCK = 4096


class TritonLoss(LossKernels):
    """Triton kernels; fp64 falls back to the eager kernels."""

    name: ClassVar[str] = "triton"

    def statistics(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if logits.dtype == torch.float64:
            return EagerLoss().statistics(logits, targets)
        rows, n = logits.shape
        log_total, chosen = logits.new_empty(2, rows, dtype=torch.float32)
        loss_statistics_row[(rows,)](logits=logits, targets=targets, log_total=log_total, chosen=chosen, **_options(n))
        return log_total, chosen

    def gradient(self, logits: Tensor, targets: Tensor, *, log_total: Tensor, scale: Tensor) -> None:
        if logits.dtype == torch.float64:
            EagerLoss().gradient(logits, targets, log_total=log_total, scale=scale)
            return
        rows, n = logits.shape
        options = _options(n)
        loss_gradient_block[(rows, triton.cdiv(n, options["BLOCK"]))](
            logits=logits, targets=targets, log_total=log_total, scale=scale, **options
        )


def _options(n: int) -> dict[str, int]:
    """Return the compile-time constants of the kernels for rows of n logits."""
    block = min(_BLOCK, triton.next_power_of_2(n))
    return {"n": n, "BLOCK": block, "num_warps": max(1, block // 512)}


@triton.jit
def loss_statistics_row(logits, targets, log_total, chosen, n: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the log-sum-exp and the logit of the target of one row."""
    row = tl.program_id(0).to(tl.int64)  # row * n exceeds 2^31 in a large chunk
    total = tl.zeros((BLOCK,), tl.float32)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        # -inf contributes nothing: past the row's end, and in `new` of a lane that has seen nothing else
        a = tl.load(logits + row * n + columns, mask=columns < n, other=-float("inf")).to(tl.float32)
        new = tl.maximum(highest, a)
        kept = tl.where(highest == new, 1.0, fast_exp(highest - new))
        total = total * kept + tl.where(a == -float("inf"), 0.0, fast_exp(a - new))
        highest = new
    top = tl.max(highest, 0)
    tl.store(log_total + row, top + tl.log(tl.sum(total * fast_exp(highest - top), 0)))
    target = tl.load(targets + row)
    found = tl.load(logits + row * n + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(chosen + row, found)


@triton.jit
def loss_gradient_block(logits, targets, log_total, scale, n: tl.constexpr, BLOCK: tl.constexpr):
    """Overwrite one block of a row's logits with its gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    place = logits + row * n + columns
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    p = fast_exp(a - tl.load(log_total + row))
    at_target = (columns == tl.load(targets + row)).to(tl.float32)
    tl.store(place, (p - at_target) * tl.load(scale + row), mask=inside)
