"""Rotary position embedding, half-split NeoX style, on the first dimensions of each head (arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [S, B, 1, dim], of positions [S, B], where B is 1 if they are those of every sample."""
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = (positions.to(torch.float32)[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dim dimensions of each head; x [..., S, B, h, d], tables of its type [S, B or 1, 1, dim]."""
    dim = cos.shape[-1]
    rotated, passed = x[..., :dim], x[..., dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((rotated * cos + turned * sin, passed), dim=-1)
