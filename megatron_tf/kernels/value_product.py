"""The second product of a Pattention: the weighted sum of the values."""

import torch
import torch.nn.functional as F
from torch import Tensor

_TOKENS_PER_BLOCK = 128  # in longer products, a BLAS was seen to change the order of a prefix's sum with what follows
_MIN_TOKENS = 8  # fewer than four are summed in yet another order: a short block is padded with zeros


def mix_values(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """Write P @ V into out [R, E], with P [R, n] and V [n, E].

    In fp32 and fp64 on an Intel CPU, appended tokens of weight zero do not change a single bit of the result: fixed
    blocks of tokens are accumulated one after another, and growth by zero keys only appends to them.
    """
    if weights.device.type != "cpu" or weights.dtype not in (torch.float32, torch.float64):
        torch.mm(weights, values, out=out)
        return
    blocks = list(zip(weights.split(_TOKENS_PER_BLOCK, 1), values.split(_TOKENS_PER_BLOCK), strict=True))
    weight, value = blocks[-1]
    missing = max(0, _MIN_TOKENS - len(value))
    if missing:
        blocks[-1] = F.pad(weight, (0, missing)), F.pad(value, (0, 0, 0, missing))
    torch.mm(*blocks[0], out=out)
    for weight, value in blocks[1:]:
        out.addmm_(weight, value)
