"""Attention of a block of queries to a block of keys, as a part of attention to more keys.

Its output comes with the log-sum-exp of each query's scores, by which parts are weighted. Backward takes the output and
the log-sum-exp over all keys: dS = P (dP - sum(dO O)) with P = exp(S - lse), the same for every block of keys (as in
FlashAttention-2, arXiv 2307.08691).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
        return out, log_sum
    if q.dtype not in _IN_16_BITS:
        return attend_block_eagerly(q, k, v, is_causal=is_causal)
    padded = (_padded(t) for t in (q, k, v))
    out, log_sum = _aten._scaled_dot_product_flash_attention(*padded, 0.0, is_causal, scale=_scale(q))[:2]
    return out[..., : q.shape[-1]], log_sum


def attend_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, log_sum: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given that of the output.

    `out` [B, h, Q, d] and `log_sum` [B, h, Q] are those of the attention to all keys.
    """
    if q.device.type in ("cpu", "meta"):
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads: tuple[Tensor, Tensor, Tensor] = backward(grad, q, k, v, out, log_sum, 0.0, is_causal)
        return grads
    if q.dtype not in _IN_16_BITS:
        return attend_block_backward_eagerly(grad, q, k, v, out=out, log_sum=log_sum, is_causal=is_causal)
    padded = [_padded(t) for t in (grad, q, k, v, out)]
    # one length for all samples, and no dropout: neither bounds nor the state of a generator
    rest = (log_sum, None, None, q.shape[2], k.shape[2], 0.0, is_causal, *q.new_empty(2, dtype=torch.int64))
    found = _aten._scaled_dot_product_flash_attention_backward(*padded, *rest, scale=_scale(q))
    dq, dk, dv = (t[..., : q.shape[-1]] for t in found)
    return dq, dk, dv


def attend_block_eagerly(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Compute `attend_block` with all scores in memory, for GPUs in 32 and 64 bits."""
    scores = _scores(q, k, is_causal)
    log_sum = scores.logsumexp(-1)
    return (scores - log_sum[..., None]).exp() @ v, log_sum


def attend_block_backward_eagerly(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, log_sum: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `attend_block_backward` with all scores in memory."""
    weights = (_scores(q, k, is_causal) - log_sum[..., None]).exp()
    grad_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * _scale(q)
    return grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad


def _scale(q: Tensor) -> float:
    width: int = q.shape[-1]
    return width**-0.5


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % _WIDTHS))


def _scores(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    """Return the scaled scores [B, h, Q, K], -inf where they are masked."""
    scores = (q * _scale(q)) @ k.mT
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores
