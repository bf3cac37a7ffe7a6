"""Products and Pattentions of a few rows on a CPU, in about the time that reading the weights takes: decoding is made
of them.

A BLAS takes one and a half to four times as long for such products, being made for many rows, and a dozen calls of
PyTorch between two of them as long again. Sums are made in fp32, each row's in an order that depends neither on the
other rows nor on the number of threads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.kernels import _row_product as native
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.tokenformer.normalisation import Normalisation

MOST_ROWS = 8  # from about here on arithmetic takes longer than reading, and a BLAS does it faster
_MULTIPLY = {torch.float32: native.multiply_rows_fp32, torch.bfloat16: native.multiply_rows_bf16}
_PATTEND = {torch.float32: native.pattend_rows_fp32, torch.bfloat16: native.pattend_rows_bf16}


class DecodingKernels(EagerKernels):
    """Eager kernels but for a few rows, whose Pattention they compute whole. They never train."""

    stores_columns = True  # each output is then a product of contiguous rows, as each score is

    def infer(
        self, norm: Normalisation, x: Tensor, *, keys: Sequence[Tensor], values: Sequence[Tensor], taus: Sequence[float]
    ) -> Tensor | None:
        """See PattentionKernels."""
        columns = [value.t() for value in values]
        if not is_for_rows(x, [*keys, *columns]):
            return None
        return pattend_rows(norm.name, x, keys=keys, columns=columns, taus=taus)


def is_for_rows(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Decide whether x [R, D] and weights [N, D] are such products, and need no gradient."""
    dtype = x.dtype
    return (
        x.shape[0] <= MOST_ROWS
        and dtype in _MULTIPLY
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.is_contiguous()
        and all(weight.dtype == dtype and weight.is_contiguous() for weight in weights)
        and not torch.compiler.is_compiling()  # which can't follow an address into C++
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [..., D] by weight^T, with weight [N, D] of the same type -> [..., N]; by torch where these are not
    few rows."""
    rows = x.flatten(0, -2)
    if not is_for_rows(rows, [weight]):
        return F.linear(x, weight)
    return multiply_rows(rows, weight).unflatten(0, x.shape[:-1])


def multiply_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [R, D] by weight^T, with weight [N, D], for what `is_for_rows` -> [R, N]."""
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
    """Compute G Pattentions of one x [R, D], each with keys [N, D], values column by column [E, N] and a tau, for what
    `is_for_rows` -> [G, R, E]. `norm` is the name of their normalisation."""
    (rows, width), (tokens, width_out) = x.shape, columns[0].t().shape
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
