"""Vocabulary-parallel embedding and output layer: each of R ranks holds V / R rows of the vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.layers.sequence import leave_tensor_parallel
from megatron_tf.parallel.collectives import group_rank
from megatron_tf.parallel.sharding import local_tensor


class VocabularyWeight(nn.Module):
    """A [V, D] weight cut by rows over the vocabulary: it embeds ids, and turns hidden states into logits."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, group: ProcessGroup | None = None, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.linear = Kernels().linear

    def embed(self, token_ids: Tensor) -> Tensor:
        """Ids [B, S] -> [s, B, D], with s = S / R under sequence parallelism."""
        weight = local_tensor(self.weight)
        ids = token_ids.t()
        if self.group is None:
            return F.embedding(ids, weight)
        local_ids = ids - group_rank(self.group) * weight.shape[0]
        outside = (local_ids < 0) | (local_ids >= weight.shape[0])
        rows = F.embedding(local_ids.masked_fill(outside, 0), weight)  # any row of ours, which is masked next
        return leave_tensor_parallel(rows.masked_fill(outside[..., None], 0.0), self.group, self.sequence_parallel)

    def logits(self, x: Tensor) -> Tensor:
        """Whole hidden states [S, B, D] -> this rank's logits [S, B, V / R]."""
        return self.linear(x, local_tensor(self.weight).to(x.dtype))
