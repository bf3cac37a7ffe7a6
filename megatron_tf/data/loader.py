"""Global batches, cut for each replica; the position in the data is a count of global samples."""

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.batch import Batch, DocumentMasking, make_batch
from megatron_tf.data.blend import Samples

PROBE_INTERVAL = 16  # batches; asking the system to read ahead costs more than reading what is in memory already


class BatchLoader(Iterator[Batch]):
    """Iterates this replica's part of one global batch after another.

    Micro-batch m of all replicas together is one run of samples, so that the same samples meet in a step whatever the
    number of replicas. `batch_size` tells how many samples the global batch has that begins at a position. The next
    batch is read while the caller works on this one, until the loader is closed as a context manager. Every
    PROBE_INTERVAL batches it is looked whether reading has to wait for the disk; where it has, the system is told of a
    batch's samples before they are read.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        batch_size: Callable[[int], int],
        micro_batch_size: int,
        replica: int,
        replicas: int,
        consumed_samples: int,
        masking: DocumentMasking,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.replica = replica
        self.replicas = replicas
        self.consumed_samples = consumed_samples
        self.masking = masking
        self._reads = 0
        self._is_cold = False
        # one thread: batches are read in their order, and _reads and _is_cold have one writer
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-loader")
        self.pending = self.reader.submit(self._read, consumed_samples)

    def __next__(self) -> Batch:
        batch = self.pending.result()
        # not before the batch is handed over: what is read ahead does not count as consumed
        self.consumed_samples += self.batch_size(self.consumed_samples)
        self.pending = self.reader.submit(self._read, self.consumed_samples)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.shutdown(cancel_futures=True)

    def _read(self, first: int) -> Batch:
        numbers = self._sample_numbers(first)
        samples = numbers.ravel().tolist()
        is_probe = self._reads % PROBE_INTERVAL == 0
        # a probe reads without telling the system, so that its faults show whether data comes from the disk
        if self._is_cold and not is_probe:
            for sample in samples:
                self.dataset.prefetch(sample)
        faults = _major_faults()
        # read on its own, for its length
        first_row = self.dataset[samples[0]]
        rows = np.empty((len(samples), len(first_row)), dtype=np.int64)
        rows[0] = first_row
        for row, sample in zip(rows[1:], samples[1:], strict=True):
            row[:] = self.dataset[sample]
        if is_probe:
            self._is_cold = _major_faults() > faults
        self._reads += 1
        return make_batch(rows.reshape(*numbers.shape, -1), numbers, self.masking)

    def _sample_numbers(self, first: int) -> NDArray[np.int64]:
        """[count, B]: which samples of the global batch that begins at `first` this replica's micro-batches hold."""
        numbers = first + np.arange(self.batch_size(first), dtype=np.int64)
        # [count, replicas, B]: replicas take turns in runs of B, so that a sample falls into the same micro-batch
        # of all whatever their number
        return numbers.reshape(-1, self.replicas, self.micro_batch_size)[:, self.replica]


def _major_faults() -> int:
    """How often this thread had to wait for the disk."""
    # elsewhere than on Linux other threads count too: then data is taken for cold too often, which only costs time
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_majflt
