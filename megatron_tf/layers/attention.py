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

Under sequence parallelism each rank saves only its part of a Pattention's input, and backward gathers it again: another
2 D (R-1)/R.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.kernels.adapters import Attend
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.kernels.documents import Documents
from megatron_tf.layers.dropout import Dropout
from megatron_tf.layers.linear import Weight
from megatron_tf.layers.norm import RMSNorm
from megatron_tf.layers.pattention import Pattention, pattend
from megatron_tf.layers.sequence import enter_tensor_parallel, leave_tensor_parallel
from megatron_tf.layers.token_chunks import Dim, TensorRanks


class Attention(nn.Module):
    """Causal attention over hidden states of width D, scaled by 1/sqrt(head_dim); subclasses define the projections."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attend = Kernels().attend
        self.attend_documents = Kernels().attend_documents
        self.rotate = Kernels().rotate

    def project_in(self, x: Tensor) -> Tensor:
        """Project x [s, B, D] -> query, key and value [3, S, B, D / R] of this rank's heads."""
        raise NotImplementedError

    def project_out(self, x: Tensor) -> Tensor:
        """Project the output of all heads, of which this rank has [S, B, D / R] -> [s, B, D]."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        attend: Attend | None = None,
        documents: Documents | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Apply attention to x [s, B, D] -> [s, B, D]; `rotary` holds the tables of x's positions.

        `attend` replaces the layer's own attention, for example by attention over a cache. `documents` turns on
        intra-document masking. `dropout` of attention weights always uses its own implementation of attention.
        """
        q, k, v = self.rotate(self.project_in(x).unflatten(-1, (-1, self.head_dim)), *rotary)
        if dropout is not None and dropout.attention_rate:
            out = dropout.attend(q, k, v, documents=documents)
        elif documents is not None:
            out = self.attend_documents(q, k, v, documents)
        else:
            out = (attend or self.attend)(q, k, v)
        return self.project_out(out.flatten(-2))


class PattentionAttention(Attention):
    """Attention whose query, key, value and output projections are Pattentions; the first three run together."""

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
        super().__init__(hidden_size // num_heads)
        project = partial(Pattention, hidden_size, hidden_size, norm_activation=norm_activation)
        self.query = project(num_tokens=qkv_tokens)
        self.key = project(num_tokens=qkv_tokens)
        self.value = project(num_tokens=qkv_tokens)
        self.proj = project(num_tokens=proj_tokens)
        tokens_or_whole: Dim | None = -2 if sequence_parallel else None
        # attention needs whole heads, but no rank needs all of them
        self.input_ranks = TensorRanks(group, gather_dim=tokens_or_whole, scatter_dim=-1)
        # every rank needs all heads of a token, since ranks share the parameter tokens, not the width
        self.output_ranks = TensorRanks(
            group, gather_dim=-1, scatter_dim=tokens_or_whole, saves_whole=not sequence_parallel
        )

    def project_in(self, x: Tensor) -> Tensor:
        """Project x as in `Attention`; the parameter tokens of every rank contribute to every head."""
        projections = [self.query, self.key, self.value]
        if any(map(has_hooks, projections)):  # hooks run only when a module is called, so call each one
            return torch.stack([projection(x, self.input_ranks) for projection in projections])
        return pattend(x, projections, self.input_ranks)

    def project_out(self, x: Tensor) -> Tensor:
        return self.proj(x, self.output_ranks)


class LinearAttention(Attention):
    """Attention with linear projections, of which each rank holds the rows of its heads.

    With a `qk_norm_epsilon`, queries and keys go through an RMSNorm over head_dim before they are rotated.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qk_norm_epsilon: float | None = None,
        group: ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(hidden_size // num_heads)
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.query = Weight(hidden_size, hidden_size)
        self.key = Weight(hidden_size, hidden_size)
        self.value = Weight(hidden_size, hidden_size)
        self.proj = Weight(hidden_size, hidden_size)
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if qk_norm_epsilon is not None:  # each rank normalizes its own heads only
            self.query_norm = RMSNorm(self.head_dim, qk_norm_epsilon, group)
            self.key_norm = RMSNorm(self.head_dim, qk_norm_epsilon, group)

    def project_in(self, x: Tensor) -> Tensor:
        x = enter_tensor_parallel(x, self.group, self.sequence_parallel)
        q, k, v = (F.linear(x, projection.of_type(x)) for projection in (self.query, self.key, self.value))
        return torch.stack([self._normalized(q, self.query_norm), self._normalized(k, self.key_norm), v])

    def project_out(self, x: Tensor) -> Tensor:
        return leave_tensor_parallel(x @ self.proj.of_type(x), self.group, self.sequence_parallel)

    def _normalized(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """Normalize each head of x [S, B, D / R]."""
        return x if norm is None else norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, which run only when it is called."""
    # torch has no public API for this
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
