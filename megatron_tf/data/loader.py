"""Loads global batches and splits them over data-parallel ranks; the position is a count of global samples."""

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_tf.data.batch import Batch, DocumentMasking, collate, pin
from megatron_tf.data.blend import Samples

PROBE_INTERVAL = 16  # batches; a read-ahead request costs more than reading data that is already in memory


class BatchLoader(Iterator[Batch]):
    """Iterates over this data-parallel rank's part of consecutive global batches.

    Micro-batch m of all data-parallel ranks together is one contiguous range of samples, so that a step sees the same
    samples whatever the number of ranks. `batch_size` returns the size of the global batch that starts at a given
    sample. A thread reads the next batch while the caller works on the current one; leave the context manager to stop
    it. Every PROBE_INTERVAL batches the loader measures whether reads wait for the disk; if so, it asks the operating
    system to read the samples of a batch ahead. Batches for a GPU, `device`, are in page-locked memory.
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
        device: torch.device | None = None,
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
        self._pins = device is not None and device.type == "cuda"
        # a new thread would use the first GPU of the host, and every rank would allocate memory there
        on_device = partial(torch.cuda.set_device, device) if self._pins else None
        # a single thread, so that batches are read in order and _reads and _is_cold have one writer
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-loader", initializer=on_device)
        self.pending = self.reader.submit(self._read, consumed_samples)

    def __next__(self) -> Batch:
        batch = self.pending.result()
        # only once the batch is handed over: read-ahead batches are not consumed yet
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
        # a probe reads without read-ahead, so that it shows whether data comes from the disk
        if self._is_cold and not is_probe:
            for sample in samples:
                self.dataset.prefetch(sample)
        waits = _disk_waits()
        rows = [self.dataset.read(sample) for sample in samples]
        if is_probe:
            self._is_cold = _disk_waits() > waits
        self._reads += 1
        batch = collate(rows, numbers, self.masking, has_loss_mask=self.dataset.has_loss_mask)
        return pin(batch) if self._pins else batch

    def _sample_numbers(self, first: int) -> NDArray[np.int64]:
        """Return the sample numbers of this rank's micro-batches of the global batch that starts at `first`:
        [count, B]."""
        numbers = first + np.arange(self.batch_size(first), dtype=np.int64)
        # [count, replicas, B]: replicas take turns every B samples, so that the global micro-batches contain the same
        # samples whatever their number
        return numbers.reshape(-1, self.replicas, self.micro_batch_size)[:, self.replica]


def _disk_waits() -> int:
    """Return a number that grows whenever this thread waits for the disk: blocks read and major page faults."""
    # other systems than Linux count all threads: then data is considered cold too often, which only costs time
    usage = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))
    return usage.ru_inblock + usage.ru_majflt
