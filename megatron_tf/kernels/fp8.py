"""Matrix products in fp8: operands are scaled to the range of an 8-bit type and cast to it; sums are in fp32.

Activations, parameter tokens and weights are cast to e4m3 (maximum 448, 3 mantissa bits), gradients to e5m2 (maximum
57,344, 2 mantissa bits). With scales s_a and s_b, a b = s_a s_b (a / s_a)(b / s_b). Shapes: a [M, K], b [K, N].

| scaling    | s_a    | s_b    |                                                      |
|------------|--------|--------|------------------------------------------------------|
| tensorwise | scalar | scalar | fastest                                              |
| rowwise    | [M, 1] | [1, N] | an outlier costs only its own row or column accuracy |
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import Literal

import torch
from torch import Tensor

from megatron_tf.errors import UserError
from megatron_tf.kernels.products import Products, Side

Scaling = Literal["tensorwise", "rowwise"]
ALIGNMENT = 16
"""M, K and N must be multiples of this: cuBLAS supports no other sizes in fp8."""
_FORWARD, _GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST = 2.0**-100  # lower bound of a maximum: the scale of a row of zeros must not be 0
_FIRST_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0


@dataclass(frozen=True)
class Fp8Products(Products):
    """Products in fp8 if every size is a multiple of ALIGNMENT, otherwise in the dtype of the operands."""

    scaling: Scaling
    is_compiled: bool = False
    """Whether inductor fuses scaling and cast into one kernel; eager PyTorch takes three."""

    def mm(self, a: Tensor, b: Tensor, *, out: Tensor | None = None, gradient: Side | None = None) -> Tensor:
        if not fits(*a.shape, b.shape[1]):
            return torch.mm(a, b, out=out)
        if gradient == "right":
            # as (b^T a^T)^T: with row-wise scales, only the left operand may be e5m2
            product = self.mm(b.t(), a.t(), gradient="left").t()
            return product.contiguous() if out is None else out.copy_(product)
        left, left_scale = self._quantized(a, _FORWARD if gradient is None else _GRADIENT)
        # the hardware requires the right operand in column-major order: contiguous rows of b^T
        right, right_scale = self._quantized(b.t(), _FORWARD)
        out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
        scaled_mm(left, right.t(), left_scale, right_scale.t(), out=out, is_forward=gradient is None)
        return out

    def add_mm(self, total: Tensor, a: Tensor, b: Tensor, *, gradient: Side | None = None) -> None:
        total.add_(self.mm(a, b, gradient=gradient))

    def mix(self, weights: Tensor, values: Tensor, *, out: Tensor) -> None:
        self.mm(weights, values, out=out)

    def _quantized(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # detached: requires_grad would cause a recompilation, and autograd is not used here
        x, is_rowwise = x.detach(), self.scaling == "rowwise"
        if not self.is_compiled:
            return _quantize(x, dtype, is_rowwise=is_rowwise)
        quantize = _compiled_quantize(x.dtype, dtype, is_rowwise=is_rowwise, is_column_major=x.stride(0) < x.stride(1))
        return quantize(x)


def choose_products(scaling: Scaling, device: torch.device, *, is_compiled: bool) -> Fp8Products:
    """Create the products for `training.precision: fp8`. Raises UserError if the GPU has no fp8 units."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"training.precision=fp8: {name} does not support fp8, which needs Ada, Hopper or later: set bf16"
        )
    return Fp8Products(scaling, is_compiled=is_compiled and device.type == "cuda")


def fits(*sizes: int) -> bool:
    """Return whether a product with these sizes can run in fp8."""
    return all(size % ALIGNMENT == 0 for size in sizes)


def say_what_does_not_fit(sizes: Iterable[tuple[str, int]]) -> str:
    """Return one line that lists the (name, size) pairs whose products stay in bf16; empty if there are none."""
    unfit = dict.fromkeys(f"{what} ({size})" for what, size in sizes if not fits(size))
    if not unfit:
        return ""
    return f"training.precision=fp8: products over {', '.join(unfit)} stay in bf16: fp8 needs multiples of {ALIGNMENT}"


def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *, out: Tensor, is_forward: bool) -> None:
    """Write a_scale b_scale (a b) into `out`, bf16 [M, N].

    a [M, K] is row-major and b [K, N] column-major, both in fp8. The fp32 scales are scalars, or [M, 1] and [1, N]. A
    CPU computes in fp32, in which a product of two fp8 numbers is exact. A GPU uses its fp8 units; in forward they
    accumulate with fewer bits on Hopper (`use_fast_accum`), which is faster and usual in fp8 recipes.
    """
    if a.device.type == "cuda":
        torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=out.dtype, use_fast_accum=is_forward, out=out)
        return
    out.copy_((a.float() @ b.float()) * a_scale * b_scale)


def _quantize(x: Tensor, dtype: torch.dtype, *, is_rowwise: bool) -> tuple[Tensor, Tensor]:
    """Return x [R, C] in fp8, row-major, and its fp32 scale: [R, 1] if row-wise, otherwise a scalar.

    A non-finite value makes the scale, and so the product, NaN: the step is then skipped as in other precisions.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=is_rowwise, dtype=torch.float32)
    if not is_rowwise:
        # in two steps: with dynamic shapes, inductor reduces a whole matrix in a single thread block
        largest = largest.amax()
    # rounding of the scale can lift the maximum slightly above the range of the type: the cast rounds it down again
    scale = largest.clamp(min=_SMALLEST) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype, memory_format=torch.contiguous_format), scale


@functools.cache
def _compiled_quantize(
    from_dtype: torch.dtype, dtype: torch.dtype, *, is_rowwise: bool, is_column_major: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    # a copy of the code for each combination of arguments: torch limits recompilations per code object
    copy = FunctionType(_quantize.__code__.replace(), _quantize.__globals__, _quantize.__name__)
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(copy, fullgraph=True, dynamic=True)
    return functools.partial(compiled, dtype=dtype, is_rowwise=is_rowwise)
