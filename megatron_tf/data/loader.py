"""Global batches, cut for each replica; the position in the data is a count of global samples."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

from megatron_tf.data.blend import Samples


class BatchLoader(Iterator[Tensor]):
    """Iterates int64 [count, B, seq_length + 1]: this replica's micro-batches of one global batch after another.

    Micro-batch m of all replicas together is one run of samples, so that the same samples meet in a step whatever the
    number of replicas. The next batch is read while the caller works on this one, until the loader is closed as a
    context manager.
    """

    def __init__(
        self,
        dataset: Samples,
        global_batch_size: int,
        micro_batch_size: int,
        replica: int,
        replicas: int,
        consumed_samples: int,
    ) -> None:
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        offsets = np.arange(global_batch_size).reshape(-1, replicas, micro_batch_size)
        self.offsets = offsets[:, replica]
        self.consumed_samples = consumed_samples
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-loader")
        self.pending = self.reader.submit(self._read, consumed_samples)

    def __next__(self) -> Tensor:
        batch = self.pending.result()
        self.consumed_samples += self.global_batch_size
        self.pending = self.reader.submit(self._read, self.consumed_samples)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.shutdown(cancel_futures=True)

    def _read(self, first: int) -> Tensor:
        rows = [self.dataset[first + int(offset)] for offset in self.offsets.flat]
        return torch.from_numpy(np.stack(rows)).unflatten(0, self.offsets.shape)
