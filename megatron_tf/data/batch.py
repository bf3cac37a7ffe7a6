"""`Batch`, the input of a training step: token ids, sample numbers, loss mask and document boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_tf.data.sample import Sample


@dataclass(frozen=True)
class DocumentMasking:
    """How end-of-document tokens within a sample affect the loss and the attention."""

    eod: int
    mask_loss: bool = False
    """Exclude the target after each end of document from the loss."""
    reset_attention: bool = False
    """Mask attention across documents, and restart position ids in each (intra-document masking)."""


@dataclass(frozen=True)
class Batch:
    """One data-parallel rank's part of a global batch: `count` micro-batches of B samples of S + 1 ids, on the CPU."""

    ids: Tensor
    """int64 [count, B, S + 1]."""
    sample_numbers: Tensor
    """int64 [count, B]: position of each sample in the run's sequence of samples."""
    num_targets: int
    """Number of targets in this batch that count in the loss."""
    ignored: Tensor | None = None
    """bool [count, B, S]: targets excluded from the loss; None if all count."""
    document_starts: Tensor | None = None
    """int64 [count, B, S]: index in the sample at which each token's document starts; None without intra-document
    masking."""
    document_lengths: Tensor | None = None
    """int32 [count, B, M]: lengths of each sample's documents, padded with zeros; None without intra-document
    masking."""


def make_batch(
    ids: NDArray[np.int64],
    sample_numbers: NDArray[np.int64],
    masking: DocumentMasking,
    *,
    counts: NDArray[np.bool_] | None = None,
    starts: NDArray[np.int64] | None = None,
) -> Batch:
    """Make a batch from ids [count, B, S + 1] and sample numbers [count, B], without copying them.

    `counts`, [count, B, S], says which targets count in the loss; by default all do. `starts`, [count, B, S], are the
    starts of documents; by default they follow the end-of-document ids.
    """
    inputs = ids[..., :-1]
    ignored = None if counts is None else ~counts
    if masking.mask_loss:
        is_end = inputs == masking.eod  # the first token of a document can't be predicted from the previous one
        ignored = is_end if ignored is None else ignored | is_end
    if not masking.reset_attention:
        starts = None
    elif starts is None:
        starts = document_starts(inputs, masking.eod)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(sample_numbers),
        inputs.size - (0 if ignored is None else int(np.count_nonzero(ignored))),
        ignored=None if ignored is None else torch.from_numpy(ignored),
        document_starts=None if starts is None else torch.from_numpy(starts),
        document_lengths=None if starts is None else torch.from_numpy(document_lengths(starts)),
    )


def collate(
    samples: Sequence[Sample], sample_numbers: NDArray[np.int64], masking: DocumentMasking, *, has_loss_mask: bool
) -> Batch:
    """Make a batch from the samples with numbers [count, B]; without `has_loss_mask` all of their targets count."""
    shape = sample_numbers.shape
    ids = np.stack([sample.ids for sample in samples], dtype=np.int64)
    counts = np.stack([_counts(sample) for sample in samples]).reshape(*shape, -1) if has_loss_mask else None
    starts = _starts(samples, ids, masking.eod).reshape(*shape, -1) if masking.reset_attention else None
    return make_batch(ids.reshape(*shape, -1), sample_numbers, masking, counts=counts, starts=starts)


def _counts(sample: Sample) -> NDArray[np.bool_]:
    """Return whether each target of a sample counts, [S]."""
    return np.ones(len(sample.ids) - 1, np.bool_) if sample.counts is None else sample.counts[1:]


def _starts(samples: Sequence[Sample], ids: NDArray[np.int64], eod: int) -> NDArray[np.int64]:
    """Return the start of each token's document, [samples, S]: by the samples' own lengths where they have them."""
    starts = document_starts(ids[:, :-1], eod)
    for row, sample in zip(starts, samples, strict=True):
        if sample.document_lengths is not None:
            lengths = np.array(sample.document_lengths)
            row[:] = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts


def pin(batch: Batch) -> Batch:
    """Copy a batch's tensors into page-locked memory, from which copies to a GPU are asynchronous."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    pinned: dict[str, Any] = {name: v.pin_memory() for name, v in values.items() if isinstance(v, Tensor)}
    return replace(batch, **pinned)


def document_starts(inputs: NDArray[np.int64], eod: int) -> NDArray[np.int64]:
    """Return the index at which each token's document starts, int64 [..., S]; an end of document belongs to the
    document it ends.

    Boundaries come from the ids, not from the dataset's index: one of its documents may contain several of these
    tokens. Samples with `document_lengths` don't need this: their documents may end a turn with the same token.
    """
    begins = np.zeros(inputs.shape, dtype=np.int64)
    # a document starts right after an end of document; the running maximum of starts is each token's own
    begins[..., 1:] = np.where(inputs[..., :-1] == eod, np.arange(1, inputs.shape[-1]), 0)
    return np.maximum.accumulate(begins, axis=-1)


def document_lengths(starts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the length of each document, int32 [..., M], from the `document_starts` of each token, int64 [..., S].

    M is a power of two, so that few shapes occur, and at least the number of documents in any sample; lengths are
    padded with zeros.
    """
    length = starts.shape[-1]
    samples = starts.reshape(-1, length)
    index = np.cumsum(samples == np.arange(length), axis=-1) - 1  # number of each token's document in its sample
    most = 1 << int(index.max()).bit_length()
    index += most * np.arange(len(samples))[:, None]
    counts = np.bincount(index.ravel(), minlength=most * len(samples))
    return counts.astype(np.int32).reshape(*starts.shape[:-1], most)
