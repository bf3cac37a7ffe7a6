"""Rotary position embedding in Triton: one pass over query, key and value in each direction, arithmetic in fp32.

It moves 6 T D elements for T tokens of width D: each of the three tensors is read and written once. Value is copied,
since a view of it would keep the unrotated query and key in memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tf.kernels import rotary


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `Rotate`; fp64 falls back to PyTorch."""
    if qkv.dtype == torch.float64:
        return rotary.rotate(qkv, cos, sin)
    q, k, v = _Rotate.apply(qkv, cos.contiguous(), sin.contiguous())
    return q, k, v


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        out = [torch.empty(qkv.shape[1:], dtype=qkv.dtype, device=qkv.device) for _ in qkv]
        _launch(qkv.contiguous().unbind(0), out, cos, sin, is_inverse=False)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        d_qkv = torch.empty(len(grads), *grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
        # the backward of a rotation is the inverse rotation
        _launch([grad.contiguous() for grad in grads], d_qkv.unbind(0), cos, sin, is_inverse=True)
        return d_qkv, None, None


def _launch(
    sources: Sequence[Tensor], targets: Sequence[Tensor], cos: Tensor, sin: Tensor, *, is_inverse: bool
) -> None:
    length, batch, heads, width = sources[0].shape
    half = cos.shape[-1] // 2
    rotate_token[(length * batch, len(sources))](
        *sources,
        *targets,
        cos_ptr=cos,
        sin_ptr=sin,
        heads=heads,
        tokens_per_position=batch if cos.shape[1] == 1 else 1,
        WIDTH=width,
        HALF=half,
        IS_INVERSE=is_inverse,
        HEADS=triton.next_power_of_2(heads),
        COLUMNS=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(width - 2 * half),
        num_warps=4,
    )


@triton.jit
def rotate_token(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    tokens_per_position,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    IS_INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
):
    """Rotate all heads of one token's query or key, or copy its value."""
    token = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    if which == 0:
        source, target = q_ptr, q_out_ptr
    elif which == 1:
        source, target = k_ptr, k_out_ptr
    else:
        source, target = v_ptr, v_out_ptr
    head = tl.arange(0, HEADS)[:, None]
    at = token * heads * WIDTH + head * WIDTH
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (head < heads) & (column < HALF)
    # both halves of a table are equal
    table = token // tokens_per_position * (2 * HALF) + column
    c = tl.load(cos_ptr + table, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin_ptr + table, mask=column < HALF, other=0.0).to(tl.float32)
    if IS_INVERSE:
        s = -s
    a = tl.load(source + at + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + at + HALF + column, mask=inside, other=0.0).to(tl.float32)
    first = tl.where(which == 2, a, a * c - b * s)
    second = tl.where(which == 2, b, b * c + a * s)
    tl.store(target + at + column, first.to(target.dtype.element_ty), mask=inside)
    tl.store(target + at + HALF + column, second.to(target.dtype.element_ty), mask=inside)
    if WIDTH > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        passed = (head < heads) & (rest < WIDTH)
        tl.store(target + at + rest, tl.load(source + at + rest, mask=passed), mask=passed)
