"""Attention of a few new tokens over cached keys and values on a CPU, for decoding.

PyTorch's attention of one query takes six to nine times as long in bf16 as in fp32. This one computes in fp32, and
rounds once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tf.kernels import _native as native
from megatron_tf.kernels.native import can_compute

MAX_TOKENS = 8  # of a sample: for more, PyTorch multiplies matrices
_ATTEND = {torch.float32: native.attend_rows_fp32, torch.bfloat16: native.attend_rows_bf16}


def is_for_rows(q: Tensor, keys: Tensor) -> bool:
    """Return whether `attend` supports q [S, B, h, d] with cached keys [B, h, C, d]: few tokens, no gradient."""
    return q.shape[0] <= MAX_TOKENS and not torch.is_grad_enabled() and can_compute(q, keys)


def attend(q: Tensor, k: Tensor, v: Tensor, *, keys: Tensor, values: Tensor, past: Sequence[int]) -> Tensor:
    """Store k and v in the cache, and apply causal attention of q, k, v [S, B, h, d] over it -> [S, B, h, d].

    `keys` and `values` [B, h, C, d] hold `past[b]` tokens of sample b; requires `is_for_rows(q, keys)`.
    """
    k, v, out = k.contiguous(), v.contiguous(), torch.empty_like(q)
    (tokens, samples, heads, dim), capacity = q.shape, keys.shape[2]
    assert k.shape == v.shape == q.shape
    assert keys.shape == values.shape == (samples, heads, capacity, dim)
    assert len(past) == samples
    assert max(past) + tokens <= capacity
    assert k.dtype == v.dtype == values.dtype == q.dtype
    _ATTEND[q.dtype](
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        past=list(past),
        tokens=tokens,
        heads=heads,
        dim=dim,
        capacity=capacity,
        threads=torch.get_num_threads(),
    )
    return out
