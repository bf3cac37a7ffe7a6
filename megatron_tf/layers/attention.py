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
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.kernels.adapters import Attend, sdpa
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.layers.dropout import Dropout
from megatron_tf.layers.linear import Weight
from megatron_tf.layers.pattention import Pattention, pattend
from megatron_tf.layers.rotary import apply_rotary
from megatron_tf.layers.sequence import enter_tensor_parallel, leave_tensor_parallel
from megatron_tf.parallel.collectives import all_gather, reduce_scatter


class Attention(nn.Module):
    """Attention over a hidden state of width D, causal, scaled by 1/sqrt(head_dim); what projects is a subclass's."""

    def __init__(self, head_dim: int, group: ProcessGroup | None, sequence_parallel: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.attend = Kernels().attend

    def project_in(self, x: Tensor) -> Tensor:
        """x [S, B, D], whole on every rank -> query, key and value [3, S, B, D / R] of this rank's heads."""
        raise NotImplementedError

    def project_out(self, x: Tensor) -> Tensor:
        """What this rank's heads [S, B, D / R] give -> [S, B, D], this rank's partial sum."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        attend: Attend | None = None,
        documents: Sequence[Sequence[int]] | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Compute attention of x [s, B, D] -> [s, B, D]; `rotary` holds the tables of x's positions.

        `attend` replaces the layer's own attention, as that over a cache does. `documents` are the lengths of each
        sample's documents, which then do not see each other. `dropout` of the weights is by
        scaled_dot_product_attention, whatever else is chosen.
        """
        x = enter_tensor_parallel(x, self.group, self.sequence_parallel)
        qk, v = self.project_in(x).unflatten(-1, (-1, self.head_dim)).split([2, 1])
        # query and key together, as both are rotated
        q, k = apply_rotary(qk, *rotary).unbind(0)
        v = v.squeeze(0)
        with nullcontext(0.0) if dropout is None else dropout.attention(q, self.group) as rate:
            attend = partial(sdpa, dropout_p=rate) if rate else attend or self.attend
            out = attend(q, k, v) if documents is None else _attend_within(documents, attend, (q, k, v))
        return leave_tensor_parallel(self.project_out(out.flatten(-2)), self.group, self.sequence_parallel)


class PattentionAttention(Attention):
    """Query, key, value and output are Pattentions; the first three run together."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qkv_tokens: int,
        proj_tokens: int,
        norm_activation: str,
        group: ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(hidden_size // num_heads, group, sequence_parallel)
        project = partial(Pattention, hidden_size, hidden_size, norm_activation=norm_activation)
        self.query = project(num_tokens=qkv_tokens)
        self.key = project(num_tokens=qkv_tokens)
        self.value = project(num_tokens=qkv_tokens)
        self.proj = project(num_tokens=proj_tokens)

    def project_in(self, x: Tensor) -> Tensor:
        """See Attention: tokens of every rank contribute to every head."""
        projections = [self.query, self.key, self.value]
        if any(map(_has_hooks, projections)):  # which are for modules that are called, one by one
            qkv = torch.stack([projection(x, self.group) for projection in projections])
        else:
            qkv = pattend(x, projections, self.group)
        # over the last dimension, which is heads: attention needs whole heads, and no rank needs all of them
        return reduce_scatter(qkv, -1, self.group)

    def project_out(self, x: Tensor) -> Tensor:
        """See Attention."""
        # every rank needs all heads of a token, as it has a part of the parameter tokens and not of the width
        return self.proj(all_gather(x, -1, self.group), self.group)


class LinearAttention(Attention):
    """Query, key, value and output are linear: each rank holds the rows of its heads."""

    def __init__(
        self, hidden_size: int, num_heads: int, *, group: ProcessGroup | None = None, sequence_parallel: bool = False
    ) -> None:
        super().__init__(hidden_size // num_heads, group, sequence_parallel)
        self.query = Weight(hidden_size, hidden_size)
        self.key = Weight(hidden_size, hidden_size)
        self.value = Weight(hidden_size, hidden_size)
        self.proj = Weight(hidden_size, hidden_size)

    def project_in(self, x: Tensor) -> Tensor:
        """See Attention."""
        return torch.stack([F.linear(x, projection.of_type(x)) for projection in (self.query, self.key, self.value)])

    def project_out(self, x: Tensor) -> Tensor:
        """See Attention."""
        return x @ self.proj.of_type(x)


def _attend_within(documents: Sequence[Sequence[int]], attend: Attend, qkv: Sequence[Tensor]) -> Tensor:
    """Attention of q, k, v [S, B, h, d] within each document: no mask of S x S, no work between documents."""
    samples = []
    for b, lengths in enumerate(documents):
        pieces = zip(*(t[:, b : b + 1].split(list(lengths)) for t in qkv), strict=True)
        samples.append(torch.cat([attend(*piece) for piece in pieces]))
    return torch.cat(samples, 1)


def _has_hooks(module: nn.Module) -> bool:
    # torch has no public way to tell
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(map(len, kinds))
