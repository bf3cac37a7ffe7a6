"""A block of a TokenFormer for a few new tokens on a CPU, in one call, for decoding.

Its several dozen PyTorch calls take a fifth of the time of a token of the published 150M model, and most of a smaller
one's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.kernels import _native as native
from megatron_tf.kernels.native import can_compute
from megatron_tf.kernels.row_product import is_for_rows

_BLOCKS = {torch.float32: native.Fp32Block, torch.bfloat16: native.Bf16Block}


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """The Pattentions of a block: query, key, value, output of attention and ffn, in this order."""

    keys: Sequence[Tensor]
    """[N, D] each."""
    columns: Sequence[Tensor]
    """Transposed values, [D, N] each."""
    taus: Sequence[float]
    norm: str
    """Name of their normalization."""
    heads: int
    epsilon: float
    """Of both layer norms."""


def can_run(x: Tensor, weights: BlockWeights) -> bool:
    """Return whether `run_block` supports x [S, B, D]: few tokens, no gradient, weights in the dtype of x."""
    return can_compute(x) and is_for_rows(x.flatten(0, 1), [*weights.keys, *weights.columns])


def run_block(
    x: Tensor,
    weights: BlockWeights,
    *,
    rotary: tuple[Tensor, Tensor],
    cached: tuple[Tensor, Tensor],
    past: Sequence[int],
) -> Tensor:
    """Apply a block to x [S, B, D] of new tokens -> [S, B, D]; requires `can_run(x, weights)`.

    `rotary` holds the tables [S, B or 1, 1, d'] of their positions, and `cached` keys and values [B, h, C, d] of
    `past[b]` tokens of sample b, to which those of the new tokens are added.
    """
    (tokens, samples, width), (cos, sin), (keys, values) = x.shape, rotary, cached
    dim, capacity = width // weights.heads, keys.shape[2]
    assert can_compute(x, cos, sin, keys, values)
    counts = [key.shape[0] for key in weights.keys]
    assert [key.shape for key in weights.keys] == [(count, width) for count in counts]
    assert [column.shape for column in weights.columns] == [(width, count) for count in counts]
    assert cos.shape == sin.shape
    assert keys.shape == values.shape == (samples, weights.heads, capacity, dim)
    assert len(past) == samples
    assert max(past) + tokens <= capacity
    block = _BLOCKS[x.dtype](
        keys=[key.data_ptr() for key in weights.keys],
        values=[column.data_ptr() for column in weights.columns],
        taus=list(weights.taus),
        tokens=counts,
        norm=weights.norm,
        heads=weights.heads,
        dim=dim,
        epsilon=weights.epsilon,
        threads=torch.get_num_threads(),
    )
    out = torch.empty_like(x)
    block.run(
        x.data_ptr(),
        out.data_ptr(),
        tokens=tokens,
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        rotated=cos.shape[-1],
        tokens_of_position=samples if cos.shape[1] == 1 else 1,
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        past=list(past),
        capacity=capacity,
    )
    return out
