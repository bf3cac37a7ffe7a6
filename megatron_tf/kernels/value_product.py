"""The second product of a Pattention: the weighted sum of the values."""

import torch
import torch.nn.functional as F
from torch import Tensor

_TOKENS_PER_BLOCK = 128  # a BLAS may sum fewer tokens in another order when more follow; it was seen above 128
_LEAST_TOKENS = 8  # and fewer than four in yet another order: they are completed with zeros


def mix_values(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """Write P @ V into out [R, E], with P [R, n] and V [n, E]; in fp32 and fp64 on a CPU, tokens of weight zero change
    no bit of it.

    There, blocks of tokens are summed one after another, which growth by zero keys leaves as they are.
    """
    if weights.device.type != "cpu" or weights.dtype not in (torch.float32, torch.float64):
        torch.mm(weights, values, out=out)
        return
    blocks = list(zip(weights.split(_TOKENS_PER_BLOCK, 1), values.split(_TOKENS_PER_BLOCK), strict=True))
    weight, value = blocks[-1]
    missing = max(0, _LEAST_TOKENS - len(value))
    if missing:
        blocks[-1] = F.pad(weight, (0, missing)), F.pad(value, (0, 0, 0, missing))
    torch.mm(*blocks[0], out=out)
    for weight, value in blocks[1:]:
        out.addmm_(weight, value)
