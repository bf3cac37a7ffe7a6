"""What the loader hands to a step: ids, the numbers of their samples, and what ends of documents mean for them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class DocumentMasking:
    """What an end of document means in a sample."""

    eod: int
    mask_loss: bool = False
    """Take no loss of the target that follows an end of document."""
    reset_attention: bool = False
    """Mask attention across documents, and restart positions in each."""


@dataclass(frozen=True)
class Batch:
    """A replica's part of a global batch: `count` micro-batches of B samples of S + 1 ids, all on the host."""

    ids: Tensor
    """int64 [count, B, S + 1]."""
    sample_numbers: Tensor
    """int64 [count, B]: each sample's position in the data of the run."""
    num_targets: int
    """Targets of this replica that the loss is taken of."""
    ignored: Tensor | None = None
    """bool [count, B, S]: targets that no loss is taken of; None where it is taken of all."""
    document_starts: Tensor | None = None
    """int64 [count, B, S]: where each token's document begins in its sample; None where documents see each other."""


def make_batch(ids: NDArray[np.int64], sample_numbers: NDArray[np.int64], masking: DocumentMasking) -> Batch:
    """Make a batch of ids [count, B, S + 1] and sample numbers [count, B], whose memory it shares."""
    inputs = ids[..., :-1]
    ignored = starts = None
    num_targets = inputs.size
    if masking.mask_loss:
        is_end = inputs == masking.eod  # nothing before a document tells of its first token
        num_targets -= int(np.count_nonzero(is_end))
        ignored = torch.from_numpy(is_end)
    if masking.reset_attention:
        starts = torch.from_numpy(document_starts(inputs, masking.eod))
    return Batch(torch.from_numpy(ids), torch.from_numpy(sample_numbers), num_targets, ignored, starts)


def document_starts(inputs: NDArray[np.int64], eod: int) -> NDArray[np.int64]:
    """Find where the document of each token begins: int64 [..., S]; an end of document belongs to what it ends.

    By the ids, not by what was read: a document of the dataset may itself be several, each with its end.
    """
    begins = np.zeros(inputs.shape, dtype=np.int64)
    # the token after an end is where the next document begins; the highest so far is then the one a token is in
    begins[..., 1:] = np.where(inputs[..., :-1] == eod, np.arange(1, inputs.shape[-1]), 0)
    return np.maximum.accumulate(begins, axis=-1)
