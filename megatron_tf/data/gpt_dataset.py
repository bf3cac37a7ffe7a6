"""Samples for language modeling: runs of seq_length + 1 tokens that may span several documents."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.extents import place_in, prefetch_extents
from megatron_tf.data.indexed_dataset import IndexedDataset
from megatron_tf.data.loss_mask import counted
from megatron_tf.data.order_cache import Order
from megatron_tf.data.sample import Sample, lengths_of_inputs


class GPTDataset:
    """A dataset whose sample i is an array of ids [seq_length + 1], in the type of the .bin file, cut from a range of
    documents in the given order; `mask` is the loss mask of the dataset, if any."""

    def __init__(
        self, dataset: IndexedDataset, documents: range, order: Order, mask: IndexedDataset | None = None
    ) -> None:
        self.dataset = dataset
        self.documents = documents
        self.order = order
        self.mask = mask
        self.has_loss_mask = mask is not None

    def __getitem__(self, sample: int) -> NDArray[np.integer]:
        return np.concatenate([self.dataset.document(*extent) for extent in self._extents(sample)])

    def read(self, sample: int) -> Sample:
        """Return a sample, with its loss mask and the lengths of its conversations if it is chat data."""
        if self.mask is None:
            return Sample(self[sample])
        extents = list(self._extents(sample))
        return Sample(self[sample], counted(self.mask, extents), lengths_of_inputs(extents))

    def prefetch(self, sample: int) -> None:
        """Ask the operating system to read a sample ahead, without waiting for it."""
        prefetch_extents(self.dataset, self._extents(sample))

    def place(self, sample: int, position: int) -> tuple[Path, int, int]:
        """Return the source of the token at `position` of a sample: (dataset, document, offset in the document)."""
        return place_in(self.dataset, self._extents(sample), position)

    def _extents(self, sample: int) -> Iterator[tuple[int, int, int]]:
        """Yield (document, start, stop) of each piece of a sample."""
        order, place = self.order.locate(sample)
        # a sample starts within a document and continues through the following ones, some of which may be empty
        position = int(order.position[place])
        offset = int(order.offset[place])
        missing = self.order.seq_length + 1
        while missing:
            document = int(order.documents[position])
            available = min(missing, int(self.order.lengths[document]) - offset)
            if available:
                yield self.documents.start + document, offset, offset + available
            missing -= available
            position += 1
            offset = 0


def split_documents(num_documents: int, shares: Sequence[float]) -> tuple[range, range, range]:
    """Split documents into training, validation and test by their shares."""
    bounds = [round(sum(shares[:i]) / sum(shares) * num_documents) for i in range(4)]
    return range(bounds[0], bounds[1]), range(bounds[1], bounds[2]), range(bounds[2], bounds[3])
