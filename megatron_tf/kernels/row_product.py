"""Matrix products and Pattentions of a few rows on a CPU, at about the speed of reading the weights, for decoding.

A BLAS, which is tuned for many rows, takes 1.5 to 4 times as long for such products, and the dozen PyTorch calls
between two of them take as long again. Sums are accumulated in fp32; the order of a row's sum depends neither on the
other rows nor on the number of threads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.kernels import _native as native
from megatron_tf.kernels.native import NativeKernels
from megatron_tf.tokenformer.normalization import Normalization

MAX_ROWS = {torch.float32: 32, torch.bfloat16: 12}
"""Above it a BLAS is as fast in bf16. In fp32 it is not yet, but with more rows, products are limited by arithmetic."""
_MULTIPLY = {torch.float32: native.multiply_rows_fp32, torch.bfloat16: native.multiply_rows_bf16}
_PATTEND = {torch.float32: native.pattend_rows_fp32, torch.bfloat16: native.pattend_rows_bf16}


class DecodingKernels(NativeKernels):
    """Kernels in C++ that compute the whole Pattention of a few rows in one call, for inference only."""

    stores_columns = True  # so that each output, like each score, is a product of contiguous rows

    def infer(
        self, norm: Normalization, x: Tensor, *, keys: Sequence[Tensor], values: Sequence[Tensor], taus: Sequence[float]
    ) -> Tensor | None:
        columns = [value.t() for value in values]
        if not is_for_rows(x, [*keys, *columns]):
            return None
        return pattend_rows(norm.name, x, keys=keys, columns=columns, taus=taus)


def is_for_rows(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether the compiled products support x [R, D] with the weights [N, D]: few rows, no gradient."""
    dtype = x.dtype
    return (
        x.shape[0] <= MAX_ROWS.get(dtype, 0)
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.is_contiguous()
        and all(weight.dtype == dtype and weight.is_contiguous() for weight in weights)
        and not torch.compiler.is_compiling()  # it can't trace raw pointers passed to C++
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [..., D] by weight^T, with weight [N, D] of the same dtype -> [..., N].

    Falls back to torch if `is_for_rows` is false.
    """
    rows = x.flatten(0, -2)
    if not is_for_rows(rows, [weight]):
        return F.linear(x, weight)
    return multiply_rows(rows, weight).unflatten(0, x.shape[:-1])


def multiply_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [R, D] by weight^T, with weight [N, D] -> [R, N]; requires `is_for_rows(x, [weight])`."""
    (rows, columns), outputs = x.shape, weight.shape[0]
    assert weight.shape == (outputs, columns)
    out = x.new_empty(rows, outputs)
    threads = torch.get_num_threads()
    _MULTIPLY[x.dtype](
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows=rows, outputs=outputs, columns=columns, threads=threads
    )
    return out


def pattend_rows(
    norm: str, x: Tensor, *, keys: Sequence[Tensor], columns: Sequence[Tensor], taus: Sequence[float]
) -> Tensor:
    """Compute G Pattentions of the same x [R, D] -> [G, R, E]; requires `is_for_rows`.

    Each has keys [N, D], transposed values [E, N] and a temperature tau. `norm` is the name of their normalization.
    """
    (rows, width), (width_out, tokens) = x.shape, columns[0].shape
    assert all(key.shape == (tokens, width) for key in keys)
    assert all(column.shape == (width_out, tokens) for column in columns)
    out = x.new_empty(len(keys), rows, width_out)
    _PATTEND[x.dtype](
        x.data_ptr(),
        out.data_ptr(),
        keys=[key.data_ptr() for key in keys],
        values=[column.data_ptr() for column in columns],
        taus=list(taus),
        norm=norm,
        rows=rows,
        tokens=tokens,
        width_in=width,
        width_out=width_out,
        threads=torch.get_num_threads(),
    )
    return out
