"""Causal attention over sequences that context-parallel ranks share, with tokens exchanged for heads.

From DeepSpeed-Ulysses (arXiv 2309.14509). Shapes: S / R tokens of each of B samples on each of R ranks, h heads.

| | tensor on each rank | communication |
|---|---|---|
| queries, keys and values | [3, S / R, B, h, d] | all-to-all |
| attention to whole sequences, of a part of the heads | [3, S, B, h / R, d] -> [S, B, h / R, d] | |
| output | [S / R, B, h, d] | all-to-all before it |
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.kernels.adapters import Attend
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.kernels.documents import AttendDocuments, Documents
from megatron_tf.layers.ring_attention import RingAttention, RingDocuments
from megatron_tf.parallel.collectives import all_to_all
from megatron_tf.parallel.context import Context


def share_sequences(kernels: Kernels, context: Context) -> Kernels:
    """Return kernels whose attention takes the tokens of one context-parallel rank, and sees the whole sequence."""
    if context.group is None:
        return kernels
    if context.method == "ring":
        return replace(kernels, attend=RingAttention(context), attend_documents=RingDocuments(context))
    return replace(
        kernels,
        attend=ExchangedHeads(kernels.attend, context.group),
        attend_documents=ExchangedHeadsOfDocuments(kernels.attend_documents, context.group),
    )


@dataclass(frozen=True)
class ExchangedHeads:
    """Attention of this rank's tokens to all earlier ones of their sequences, as an `Attend`."""

    attend: Attend
    group: ProcessGroup

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q to k, v, all [S / R, B, h, d] -> [S / R, B, h, d]."""
        return _to_tokens(self.attend(*_to_heads(q, k, v, self.group)), self.group)


@dataclass(frozen=True)
class ExchangedHeadsOfDocuments(AttendDocuments):
    """The same within documents."""

    attend: AttendDocuments
    group: ProcessGroup

    @property
    def reads_on_host(self) -> bool:
        return self.attend.reads_on_host

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        return _to_tokens(self.attend(*_to_heads(q, k, v, self.group), documents), self.group)


def _to_heads(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange some tokens of all heads for all tokens of some heads: [S / R, B, h, d] -> [S, B, h / R, d]."""
    q, k, v = all_to_all(torch.stack((q, k, v)), group, split_dim=3, concat_dim=1).unbind(0)
    return q, k, v


def _to_tokens(out: Tensor, group: ProcessGroup) -> Tensor:
    """Exchange back: [S, B, h / R, d] -> [S / R, B, h, d]."""
    return all_to_all(out, group, split_dim=0, concat_dim=2)
