"""The order of samples: a function of the data, the seed and the epoch; not of the layout or the length of the run.

Epoch e lays the documents end to end in an order of its own, cuts them into samples, and shuffles these. The arrays of
an epoch are built once, by whichever process comes first, and mapped by all.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_tf._index import permutation, sample_index
from megatron_tf.data.indexed_dataset import DataError

ORDER_VERSION = 2
ARRAYS = ("documents", "position", "offset", "shuffle")
LOCK_TIMEOUT_SECONDS = 600.0


class EpochOrder:
    """One epoch's arrays, memory-mapped.

    `documents` [d] is their order. The sample at place i begins in document `documents[position[i]]` at `offset[i]`;
    both are [n + 1]. Places are visited in the order of `shuffle` [n]. Ids take 32 bits where that is enough for all.
    """

    def __init__(self, directory: Path) -> None:
        self.documents, self.position, self.offset, self.shuffle = (
            np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r")) for name in ARRAYS
        )


class SampleOrder:
    """Samples of `seq_length` + 1 tokens over documents of the given lengths, epoch after epoch without end.

    Raises DataError where there are too few tokens for one sample.
    """

    def __init__(self, lengths: NDArray[np.integer], seq_length: int, seed: int, name: str, cache: Path) -> None:
        self.lengths = np.require(lengths, requirements=["C", "ALIGNED"])  # a view of a file may lie unaligned
        self.seq_length, self.seed, self.name, self.cache = seq_length, seed, name, cache
        tokens = int(self.lengths.sum(dtype=np.int64))
        self.samples_per_epoch = max(0, tokens - 1) // seq_length
        if self.samples_per_epoch == 0:
            raise DataError(
                f"{name} has {tokens:,} tokens, too few for one sample of {seq_length} + 1: "
                f"give more data, another split, or a smaller training.seq_length"
            )
        self.content = xxhash.xxh3_128_hexdigest(self.lengths.data)
        self._epoch: tuple[int, EpochOrder] | None = None

    def locate(self, sample: int) -> tuple[EpochOrder, int]:
        """(arrays of the sample's epoch, its place in their `index`)."""
        epoch, place = divmod(sample, self.samples_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._open(epoch)
        order = self._epoch[1]
        return order, int(order.shuffle[place])

    def _open(self, epoch: int) -> EpochOrder:
        key = hashlib.blake2b(
            repr((ORDER_VERSION, self.content, self.seq_length, self.seed, self.name, epoch)).encode(),
            digest_size=16,
        ).hexdigest()
        directory = self.cache / f"order-{key}"
        if not directory.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            with _locked(self.cache / f"order-{key}.lock"):
                if not directory.exists():
                    self._build(epoch, directory)
        return EpochOrder(directory)

    def _build(self, epoch: int, directory: Path) -> None:
        documents = permutation(len(self.lengths), *self._keys(epoch, "documents"))
        position, offset = sample_index(documents, self.lengths, self.seq_length)
        shuffle = permutation(self.samples_per_epoch, *self._keys(epoch, "samples"))
        temporary = directory.with_suffix(f".{os.getpid()}.tmp")
        temporary.mkdir()
        for name, array in zip(ARRAYS, (documents, position, offset, shuffle), strict=True):
            np.save(temporary / f"{name}.npy", array)
        temporary.rename(directory)

    def _keys(self, epoch: int, what: str) -> tuple[int, int]:
        digest = hashlib.blake2b(repr((self.seed, self.name, epoch, what)).encode(), digest_size=16).digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`. Raises DataError when another process holds it too long."""
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(f"{path}: another process held the lock for {LOCK_TIMEOUT_SECONDS:.0f} s") from None
                time.sleep(0.05)
        yield
