"""Rotary position embedding of query and key, half-split NeoX style, on the first dimensions of each head.

From RoFormer (arXiv 2104.09864); the official TokenFormer rotates as GPT-NeoX does.
"""

from typing import Protocol

import torch
from torch import Tensor


class Rotate(Protocol):
    """Implementation of the rotation."""

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv [3, S, B, h, d] into q, k and v [S, B, h, d], and rotate q and k.

        The tables [S, B or 1, 1, dim], of the dtype of qkv, rotate the first dim dimensions of each head.
        """


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `Rotate` in PyTorch."""
    dim = cos.shape[-1]
    qk, v = qkv.split([2, 1])
    rotated, passed = qk[..., :dim], qk[..., dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    q, k = torch.cat((rotated * cos + turned * sin, passed), dim=-1).unbind(0)
    return q, k, v.squeeze(0)
