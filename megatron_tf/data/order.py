"""The order of samples: a function of the data, the seed and the epoch, but not of the layout or length of the run.

Each epoch shuffles the documents, concatenates them, cuts them into samples, and shuffles these.
"""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_tf.data._index import permutation, sample_index
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.order_cache import OrderArrays, StoredOrder, open_or_build

ORDER_VERSION = 2
_GROUP_ENTRIES = 1 << 18
"""Array entries up to which epochs share files: a small dataset may be read for thousands of epochs."""
_MAX_GROUP = 256  # epochs


class EpochOrder(ABC):
    """An unbounded order of samples of `seq_length` + 1 tokens over documents of the given lengths, epoch by epoch.

    `key` distinguishes the files of a kind of order in the cache.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        *,
        seq_length: int,
        seed: int,
        name: str,
        cache: Path,
        key: tuple[object, ...],
    ) -> None:
        self.lengths = aligned(lengths)
        self.seq_length = seq_length
        self.seed = seed
        self.name = name
        self.cache = cache
        self.samples_per_epoch = self._count()
        self.content = xxhash.xxh3_128_hexdigest(self.lengths.data)
        self._key = key
        entries = max(len(self.lengths), self.samples_per_epoch, 1)
        self._epochs_of_file = max(1, min(_MAX_GROUP, _GROUP_ENTRIES // entries))
        # each is replaced as a whole, as loaders in several threads may share an order
        self._epoch: tuple[int, OrderArrays, StoredOrder] | None = None
        self._group: tuple[int, StoredOrder] | None = None

    @abstractmethod
    def _count(self) -> int:
        """Return the number of samples in an epoch. Raises DataError if there is none."""

    @abstractmethod
    def _build(self, epoch: int) -> OrderArrays:
        """Compute the order of an epoch; its arrays have the same shapes in each."""

    def locate(self, sample: int) -> tuple[OrderArrays, int]:
        """Return (arrays of the sample's epoch, index of the sample in them)."""
        epoch, visit = divmod(sample, self.samples_per_epoch)
        known = self._epoch
        # consecutive samples share an epoch: files are only opened and checked when it changes
        if known is None or known[0] != epoch:
            known = self._epoch = epoch, *self._open(epoch)
        _, arrays, stored = known
        stored.check()
        return arrays, int(arrays.shuffle[visit])

    def _open(self, epoch: int) -> tuple[OrderArrays, StoredOrder]:
        """Return the arrays of an epoch, and the files that hold them."""
        group, row = divmod(epoch, self._epochs_of_file)
        known = self._group
        if known is None or known[0] != group:
            key: tuple[object, ...] = (*self._key, self.content, self.seq_length, self.seed, self.name, group)
            # not part of the key for large datasets, so that their existing caches keep their names
            if self._epochs_of_file > 1:
                key = (*key, self._epochs_of_file)
            known = self._group = group, open_or_build(self.cache, key, lambda: self._build_group(group))
        rows = known[1].arrays
        return (OrderArrays(*(array[row] for array in rows)) if self._epochs_of_file > 1 else rows), known[1]

    def _build_group(self, group: int) -> OrderArrays:
        """Build the arrays of the epochs that share files, one row per epoch."""
        first = group * self._epochs_of_file
        epochs = [self._build(first + i) for i in range(self._epochs_of_file)]
        return OrderArrays(*map(np.stack, zip(*epochs, strict=True))) if len(epochs) > 1 else epochs[0]

    def _permutation(self, n: int, epoch: int, what: str) -> NDArray[np.integer]:
        # keyed by the name too, so that datasets of equal size are shuffled differently
        digest = hashlib.blake2b(repr((self.seed, self.name, epoch, what)).encode(), digest_size=16).digest()
        return permutation(n, int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))


class SampleOrder(EpochOrder):
    """The order of samples that are cut from the documents end to end.

    Raises DataError if there are too few tokens for one sample.
    """

    def __init__(self, lengths: NDArray[np.integer], *, seq_length: int, seed: int, name: str, cache: Path) -> None:
        key = (ORDER_VERSION,)
        super().__init__(lengths, seq_length=seq_length, seed=seed, name=name, cache=cache, key=key)

    def _count(self) -> int:
        return samples_in(self.lengths, self.seq_length, self.name)

    def _build(self, epoch: int) -> OrderArrays:
        # shuffle documents first, so that each epoch cuts samples at different places; then samples, so that the
        # pieces of a long document are not consecutive
        documents = self._permutation(len(self.lengths), epoch, "documents")
        position, offset = sample_index(documents, self.lengths, self.seq_length)
        shuffle = self._permutation(self.samples_per_epoch, epoch, "samples")
        return OrderArrays(documents=documents, position=position, offset=offset, shuffle=shuffle)


def aligned(lengths: NDArray[np.integer]) -> NDArray[np.integer]:
    """Copy lengths that are not aligned in memory, as views of an index file may be; return others unchanged."""
    return np.require(lengths, requirements=["C", "ALIGNED"])


def samples_in(lengths: NDArray[np.integer], seq_length: int, name: str) -> int:
    """Return the number of samples in one epoch. Raises DataError if there is not even one."""
    tokens = int(lengths.sum(dtype=np.int64))
    samples = max(0, tokens - 1) // seq_length
    if samples == 0:
        raise DataError(
            f"{name} has {tokens:,} tokens, too few for one sample of {seq_length} + 1: "
            f"give more data, another split, or a smaller training.seq_length"
        )
    return samples
