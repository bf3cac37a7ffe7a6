"""Products of a few rows with a large matrix on a CPU, in the time that reading it takes: decoding is made of them.

A BLAS takes two to four times as long for them: it is made for many rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tf._row_product import multiply_rows_bf16, multiply_rows_fp32

MOST_ROWS = 8  # from about here on arithmetic takes longer than reading, and a BLAS does it faster
_FUNCTIONS = {torch.float32: multiply_rows_fp32, torch.bfloat16: multiply_rows_bf16}


def is_faster(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `multiply` is better than a BLAS for x [..., R, D] and weights [N, D]; and no gradient is asked for."""
    dtype = x.dtype
    return (
        x.shape[-2] <= MOST_ROWS
        and dtype in _FUNCTIONS
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.is_contiguous()
        and all(weight.dtype == dtype and weight.is_contiguous() for weight in weights)
        and not torch.compiler.is_compiling()
    )


def multiply(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x [R, D], or [G, R, D] with one for each of the G weights [N, D] -> x weight^T [G, R, N].

    For what `is_faster` has agreed to. Sums are made in fp32, each row's in an order that depends neither on the other
    rows nor on the number of threads.
    """
    rows, columns = x.shape[-2:]
    outputs = weights[0].shape[0]
    assert x.dim() == 2 or len(x) == len(weights)
    assert all(weight.shape == (outputs, columns) for weight in weights)
    out = x.new_empty(len(weights), rows, outputs)
    addresses = [weight.data_ptr() for weight in weights]
    threads = torch.get_num_threads()
    _FUNCTIONS[x.dtype](x.data_ptr(), x.dim() == 2, addresses, out.data_ptr(), rows, outputs, columns, threads)
    return out
