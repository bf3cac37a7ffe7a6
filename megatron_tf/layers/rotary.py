"""Tables of the rotary position embedding (arXiv 2104.09864); `megatron_tf/kernels/rotary.py` applies them."""

import torch
from torch import Tensor


def rotary_tables(
    positions: Tensor, dim: int, base: float, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [S, B, 1, dim] of `dtype`, of positions [S, B]; B is 1 if all samples share them."""
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)
    angles = (positions.to(dtype)[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]
