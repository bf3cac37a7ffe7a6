"""Ends of documents within samples: which targets count, and where each token's document begins."""

import torch
from torch import Tensor

from megatron_tf.layers.cross_entropy import IGNORE_INDEX


def mask_targets_after_eod(inputs: Tensor, targets: Tensor, eod: int) -> Tensor:
    """`targets` [B, S] without what follows an end of document, which nothing before it tells of."""
    return targets.masked_fill(inputs == eod, IGNORE_INDEX)


def document_starts(inputs: Tensor, eod: int) -> Tensor:
    """Position at which the document of each token begins: int64 [B, S]; an end of document belongs to what it ends."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    begins = torch.zeros_like(inputs, dtype=torch.bool)
    begins[:, 1:] = inputs[:, :-1] == eod
    return torch.where(begins, positions, 0).cummax(1).values
