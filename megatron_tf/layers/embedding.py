"""Vocabulary-parallel embedding and output layer: each of R ranks holds V / R rows of the vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.layers.casting import CastingModule
from megatron_tf.layers.cross_entropy import head_loss
from megatron_tf.layers.sequence import leave_tensor_parallel
from megatron_tf.parallel.collectives import group_rank


class VocabularyWeight(CastingModule):
    """A weight [V, D] sharded over the vocabulary, used as embedding, as output layer, or as both if they are tied."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, group: ProcessGroup | None = None, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.linear = Kernels().linear
        self.loss_kernels = Kernels().loss

    def embed(self, token_ids: Tensor) -> Tensor:
        """Look up ids [B, S] -> [s, B, D], with s = S / R under sequence parallelism and S otherwise."""
        weight = self.weight
        ids = token_ids.t()
        if self.group is None:
            return F.embedding(ids, weight)
        local_ids = ids - group_rank(self.group) * weight.shape[0]
        outside = (local_ids < 0) | (local_ids >= weight.shape[0])
        rows = F.embedding(local_ids.masked_fill(outside, 0), weight)  # other ranks' ids, masked below, read row 0
        return leave_tensor_parallel(rows.masked_fill(outside[..., None], 0.0), self.group, self.sequence_parallel)

    def logits(self, x: Tensor) -> Tensor:
        """Compute this rank's logits [S, B, V / R] of whole hidden states [S, B, D]."""
        return self.linear(x, self.cast("weight", x.dtype))

    def loss(self, x: Tensor, targets: Tensor, divisor: float) -> Tensor:
        """Compute the summed loss of whole hidden states [S, B, D] and target ids [B, S] over `divisor`, a scalar.

        The logits never exist all at once; see `head_loss`.
        """
        return head_loss(
            x.flatten(0, 1),
            self.weight,
            targets.t().flatten(),
            divisor=divisor,
            group=self.group,
            kernels=self.loss_kernels,
            cast_weight=self.detached("weight", x.dtype),
        )
