"""Samples under `data.packing: best_fit`: rows of whole documents, each after an end-of-document id."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.blend import BlendedDataset, Samples
from megatron_tf.data.extents import place_in, prefetch_extents
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.packed_order import PackedOrder, PackingReport
from megatron_tf.data.sample import Sample


def end_id(dataset: IndexedDataset) -> int:
    """Return the id that the documents of a dataset end with. Raises DataError if they have none."""
    for number in range(len(dataset)):
        document = dataset.document(number)
        if len(document):
            return int(document[-1])
    raise DataError(f"{dataset.prefix} has no tokens")


def packing_reports(dataset: Samples) -> list[PackingReport]:
    """Return what packing does to each packed dataset of the training data."""
    if isinstance(dataset, BlendedDataset):
        return [report for part in dataset.datasets for report in packing_reports(part)]
    return [dataset.order.report()] if isinstance(dataset, PackedDataset) else []


class PackedDataset:
    """A dataset whose sample i is a row of documents, [seq_length + 1] ids in the type of the .bin file.

    A row is an end-of-document id, its documents, and padding with the same id. So an end-of-document id comes before
    every document, and the targets are each token of the documents once. Inputs belong to the document of their
    targets: each document begins with the end-of-document id before it.
    """

    has_loss_mask = True  # the padding

    def __init__(
        self, dataset: IndexedDataset, documents: range, order: PackedOrder, mask: IndexedDataset | None = None
    ) -> None:
        self.dataset = dataset
        self.documents = documents
        self.order = order
        self.mask = mask
        self._end = end_id(dataset)

    def __getitem__(self, sample: int) -> NDArray[np.integer]:
        return self.read(sample).ids

    def read(self, sample: int) -> Sample:
        """Return a row. Raises DataError for a document without an end, which the next one would continue."""
        ids = np.full(self.order.seq_length + 1, self._end, dtype=self.dataset.dtype)
        counts = np.zeros(len(ids), dtype=np.bool_)
        lengths = []
        place = 1
        for document, start, stop in self._extents(sample):
            if ids[place - 1] != self._end:
                raise DataError(
                    f"{self.dataset.prefix}: the document before document {document} in sample {sample} does not end "
                    f"with id {self._end}, as others do: preprocess the text with --append-eod, or set data.packing to "
                    f"concatenate"
                )
            end = place + stop - start
            ids[place:end] = self.dataset.document(document, start, stop)
            counts[place:end] = True if self.mask is None else self.mask.document(document, start, stop)
            lengths.append(stop - start)
            place = end
        if place < len(ids):
            lengths.append(len(ids) - place)
        return Sample(ids, counts, lengths)

    def prefetch(self, sample: int) -> None:
        """Ask the operating system to read a sample ahead, without waiting for it."""
        prefetch_extents(self.dataset, self._extents(sample))

    def place(self, sample: int, position: int) -> tuple[Path, int, int]:
        """Return the source of the token at `position` of a sample: (dataset, document, offset in the document)."""
        # an id stands before the first document
        return place_in(self.dataset, self._extents(sample), position - 1)

    def _extents(self, sample: int) -> Iterator[tuple[int, int, int]]:
        """Yield (document, start, stop) of each piece of a sample."""
        order, row = self.order.locate(sample)
        for piece in range(int(order.position[row]), int(order.position[row + 1])):
            document, start = int(order.documents[piece]), int(order.offset[piece])
            stop = min(int(self.order.lengths[document]), start + self.order.seq_length)
            yield self.documents.start + document, start, stop
