"""Causal self-attention whose four projections are Pattentions, sharded over tensor-parallel ranks.

Shapes: S sequence, B batch, D hidden, R ranks; s = S / R under sequence parallelism, otherwise S.

| step                     | tensor on each rank  | communication            |
|--------------------------|----------------------|--------------------------|
| input                    | [s, B, D]            |                          |
| all-gather sequence      | [S, B, D]            | D (R-1)/R per token      |
| query, key, value        | [3, S, B, D] partial | 3 scalars per token      |
| reduce-scatter heads     | [3, S, B, D/R]       | 3 D (R-1)/R              |
| attention on own heads   | [S, B, D/R]          |                          |
| all-gather heads         | [S, B, D]            | D (R-1)/R                |
| output projection        | [S, B, D] partial    | 1 scalar                 |
| reduce-scatter sequence  | [s, B, D]            | D (R-1)/R                |
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.layers.pattention import Pattention, pattend
from megatron_tf.layers.rotary import apply_rotary
from megatron_tf.layers.sequence import enter_tensor_parallel, leave_tensor_parallel
from megatron_tf.parallel.collectives import all_gather, reduce_scatter


class KeyValueCache:
    """Keys and values of the tokens one attention layer has seen: each [S, B, heads, head_dim]."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen."""
        return 0 if self.key is None else self.key.shape[0]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens and return all."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat((self.key, key)), torch.cat((self.value, value))
        self.key, self.value = key, value
        return key, value


class Attention(nn.Module):
    """Attention of `num_heads` heads over a hidden state of width D, causal, scaled by 1/sqrt(head_dim)."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        qkv_tokens: int,
        proj_tokens: int,
        norm_activation: str,
        group: ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.query = Pattention(hidden_size, hidden_size, qkv_tokens, norm_activation)
        self.key = Pattention(hidden_size, hidden_size, qkv_tokens, norm_activation)
        self.value = Pattention(hidden_size, hidden_size, qkv_tokens, norm_activation)
        self.proj = Pattention(hidden_size, hidden_size, proj_tokens, norm_activation)
        self.head_dim = hidden_size // num_heads
        self.group = group
        self.sequence_parallel = sequence_parallel

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: KeyValueCache | None = None,
        documents: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """x [s, B, D] -> [s, B, D]; `rotary` holds the tables of x's positions.

        `documents` are the lengths of each sample's documents, which then do not see each other.
        """
        x = enter_tensor_parallel(x, self.group, self.sequence_parallel)
        qkv = pattend(x, [self.query, self.key, self.value], self.group)
        qkv = reduce_scatter(qkv, -1, self.group)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).unbind(0)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        past = 0 if cache is None else cache.length
        if cache is not None:
            k, v = cache.append(k, v)
        out = _causal_attention(q, k, v, past) if documents is None else _attention_within(q, k, v, documents)
        out = all_gather(out.flatten(-2), -1, self.group)
        return leave_tensor_parallel(self.proj(out, self.group), self.group, self.sequence_parallel)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
    """q [S, B, h, d] against k, v [past + S, B, h, d]: query i sees keys up to past + i."""
    length = q.shape[0]
    mask = None
    if past and length > 1:
        mask = torch.ones(length, past + length, dtype=torch.bool, device=q.device).tril(past)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past == 0)
    return out.permute(2, 0, 1, 3)


def _attention_within(q: Tensor, k: Tensor, v: Tensor, documents: Sequence[Sequence[int]]) -> Tensor:
    """Causal attention of q, k, v [S, B, h, d] within each document: no mask of S x S, no work between documents."""
    samples = []
    for b, lengths in enumerate(documents):
        queries, keys, values = (t[:, b : b + 1].split(list(lengths)) for t in (q, k, v))
        pieces = zip(queries, keys, values, strict=True)
        samples.append(torch.cat([_causal_attention(*piece, 0) for piece in pieces]))
    return torch.cat(samples, 1)
