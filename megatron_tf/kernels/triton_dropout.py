"""Dropout in Triton: random bits are generated in registers, in forward and again in backward, and never stored.

With R rows of n elements, forward reads x and the residual and writes the sum (3 R n elements); backward reads and
writes one gradient (2 R n).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tf.kernels import dropout

_BLOCK = 2048
"""Maximum elements of a row per program."""


def drop(x: Tensor, seeds: Tensor, *, stream: int, rate: float, residual: Tensor | None = None) -> Tensor:
    """Compute `Drop` with the same masks as the PyTorch implementation, to which fp64 falls back."""
    if x.dtype == torch.float64:
        return dropout.drop(x, seeds, stream=stream, rate=rate, residual=residual)
    out: Tensor = _Drop.apply(x, residual, seeds, stream, rate)
    return out


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, seeds: Tensor, stream: int, rate: float) -> Tensor:
        ctx.save_for_backward(seeds)
        ctx.stream, ctx.rate = stream, rate
        return _launch(x, residual, seeds, stream=stream, rate=rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seeds,) = ctx.saved_tensors
        dropped = _launch(grad, None, seeds, stream=ctx.stream, rate=ctx.rate)
        return dropped, grad if ctx.needs_input_grad[1] else None, None, None, None


def _launch(x: Tensor, residual: Tensor | None, seeds: Tensor, *, stream: int, rate: float) -> Tensor:
    x, seeds = x.contiguous(), seeds.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    n = x.shape[-1]
    block = min(_BLOCK, triton.next_power_of_2(max(n, 2)))
    drop_block[(seeds.numel(), triton.cdiv(n, block))](
        x_ptr=x,
        residual_ptr=out if residual is None else residual,
        seeds_ptr=seeds,
        out_ptr=out,
        offset=dropout.offset(stream),
        threshold=dropout.threshold(rate),
        scale=dropout.scale(rate),
        n=n,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )
    return out


@triton.jit
def _mix(word):
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


# not specialized: these differ from layer to layer, and a separate kernel for multiples of 16 is not worth it
@triton.jit(do_not_specialize=["offset", "threshold"])
def drop_block(
    x_ptr,
    residual_ptr,
    seeds_ptr,
    out_ptr,
    offset,
    threshold,
    scale,
    n,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Drop elements of one block of a row; each random word decides two of them, which the same thread holds."""
    row = tl.program_id(0).to(tl.int64)
    seed = _mix((tl.load(seeds_ptr + row) + offset).to(tl.uint64))
    index = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    words = _mix(seed + (index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)
    half = tl.arange(0, 2)
    bits = (words[:, None] >> (half[None, :] * 32).to(tl.uint64)).to(tl.int32)
    columns = index[:, None] * 2 + half[None, :]
    at = row * n + columns
    inside = columns < n
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(bits < threshold, 0.0, x * scale)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
