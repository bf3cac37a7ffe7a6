"""How context-parallel ranks share the tokens of each sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.config import ContextParallelMethod
from megatron_tf.parallel.collectives import group_size


@dataclass(frozen=True)
class Context:
    """The part of each sequence that this rank has, of R ranks.

    all_to_all: part r of R. ring: chunks r and 2 R - 1 - r of 2 R, in this order; under a causal mask a query in an
    early chunk attends to few keys and one in a late chunk to many, so all ranks have the same work.
    """

    group: ProcessGroup | None = None
    """The context-parallel ranks; None for one, which has whole sequences."""
    method: ContextParallelMethod = "ring"

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """Return the indices of the equal chunks that a rank of the group has, in increasing order."""
        if self.group is None or self.method == "all_to_all":
            return (rank,)
        return rank, 2 * self.group.size() - 1 - rank

    def cut(self, x: Tensor) -> Tensor:
        """Return this rank's tokens of whole sequences: [..., S] -> [..., S / R]."""
        if self.group is None:
            return x
        mine = self.chunks_of(self.group.rank())
        chunks = x.chunk(self.group.size() * len(mine), -1)
        return torch.cat([chunks[i] for i in mine], -1)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Return the positions in their sequence of this rank's `tokens` tokens of each, int64 [tokens]."""
        return self.cut(torch.arange(tokens * group_size(self.group), device=device))
