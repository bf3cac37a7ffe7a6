"""Products and Pattentions of a few rows on a CPU, in about the time that reading the weights takes: decoding is made
of them.

A BLAS takes one and a half to four times as long for such products, being made for many rows, and a dozen calls of
PyTorch between two of them as long again. Sums are made in fp32, each row's in an order that depends neither on the
other rows nor on the number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tf import _row_product as native

MOST_ROWS = 8  # from about here on arithmetic takes longer than reading, and a BLAS does it faster
_MULTIPLY = {torch.float32: native.multiply_rows_fp32, torch.bfloat16: native.multiply_rows_bf16}
_ATTEND = {torch.float32: native.attend_rows_fp32, torch.bfloat16: native.attend_rows_bf16}


def is_for_rows(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether x [R, D] and weights [N, D] are such; and no gradient is asked for."""
    dtype = x.dtype
    return (
        x.shape[0] <= MOST_ROWS
        and dtype in _MULTIPLY
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.is_contiguous()
        and all(weight.dtype == dtype and weight.is_contiguous() for weight in weights)
        and not torch.compiler.is_compiling()
    )


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, D] weight^T, with weight [N, D], of what `is_for_rows` -> [R, N]."""
    (rows, columns), outputs = x.shape, weight.shape[0]
    assert weight.shape == (outputs, columns)
    out = x.new_empty(rows, outputs)
    addresses = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    _MULTIPLY[x.dtype](*addresses, rows, outputs, columns, torch.get_num_threads())
    return out


def attend(x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], taus: Sequence[float], norm: str) -> Tensor:
    """G Pattentions of one x [R, D], each with keys [N, D], transposed values [E, N] and a tau, for what `is_for_rows`
    -> [G, R, E]. `norm` is the name of their normalisation."""
    (rows, width), (tokens, width_out) = x.shape, values[0].t().shape
    assert all(key.shape == (tokens, width) for key in keys)
    assert all(value.shape == (width_out, tokens) for value in values)
    out = x.new_empty(len(keys), rows, width_out)
    addresses = [key.data_ptr() for key in keys], [value.data_ptr() for value in values]
    shape = rows, tokens, width, width_out
    _ATTEND[x.dtype](x.data_ptr(), *addresses, list(taus), out.data_ptr(), norm, *shape, torch.get_num_threads())
    return out
