"""Attention of a block of queries to a block of keys, as a part of attention to more keys.

Its output comes with the log-sum-exp of each query's scores, by which parts are weighted. Backward takes the output and
the log-sum-exp over all keys: dS = P (dP - sum(dO O)) with P = exp(S - lse), the same for every block of keys (as in
FlashAttention-2, arXiv 2307.08691).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.tokenformer.normalization import accumulation_type

_aten = torch.ops.aten
_IN_16_BITS = (torch.float16, torch.bfloat16)
_WIDTHS = 8  # flash attention on GPUs needs head widths that are multiples of this


def attend_block(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attend from q [B, h, Q, d] to k, v [B, h, K, d] -> (output [B, h, Q, d], log-sum-exp [B, h, Q]).

    Scores are scaled by 1/sqrt(d). With `is_causal`, Q = K, and query i attends to keys 0 to i. The log-sum-exp is in
    the accumulation type. Works outside autograd.
    """
    if q.device.type in ("cpu", "meta"):
        out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
    elif q.dtype in _IN_16_BITS:
        scale = q.shape[-1] ** -0.5
        padded = (_padded(t) for t in (q, k, v))
        out, log_sum = _aten._scaled_dot_product_flash_attention(*padded, 0.0, is_causal, scale=scale)[:2]
        out = out[..., : q.shape[-1]]
    else:
        scores = _scores(q, k, is_causal)
        log_sum = scores.logsumexp(-1)
        out = (scores - log_sum[..., None]).exp().to(v.dtype) @ v
    return out, log_sum


def attend_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, log_sum: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given that of the output.

    `out` [B, h, Q, d] and `log_sum` [B, h, Q] are those of the attention to all keys.
    """
    width = q.shape[-1]
    if q.device.type in ("cpu", "meta"):
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads: tuple[Tensor, Tensor, Tensor] = backward(grad, q, k, v, out, log_sum, 0.0, is_causal)
        return grads
    if q.dtype in _IN_16_BITS:
        padded = [_padded(t) for t in (grad, q, k, v, out)]
        # one length for all samples, and no dropout, so no bounds and no state of a generator
        rest = (log_sum, None, None, q.shape[2], k.shape[2], 0.0, is_causal, *q.new_empty(2, dtype=torch.int64))
        found = _aten._scaled_dot_product_flash_attention_backward(*padded, *rest, scale=width**-0.5)
        dq, dk, dv = (t[..., :width] for t in found)
        return dq, dk, dv
    weights = (_scores(q, k, is_causal) - log_sum[..., None]).exp()
    grad_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * width**-0.5
    return grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % _WIDTHS))


def _scores(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    """Return the scaled scores [B, h, Q, K] in the accumulation type, -inf where they are masked."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.to(accumulation_type(q))
