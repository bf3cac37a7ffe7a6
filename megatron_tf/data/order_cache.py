"""Cache of order arrays on disk: built once by the first process, verified and memory-mapped by all."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.files import locked

LOCK_TIMEOUT_SECONDS = 600.0


class OrderArrays(NamedTuple):
    """The boundaries and the order of the samples of one epoch, or of a whole run.

    `documents` [d] is the order of the documents. Sample i before shuffling starts in document
    `documents[position[i]]` at `offset[i]`; both are [n + 1]. `shuffle` [n] is the order in which samples are read.
    Integers have 32 bits if that is enough for all of them.

    Under best-fit packing, sample i consists of the pieces [position[i], position[i + 1]): piece p is of document
    `documents[p]` and begins at `offset[p]`.
    """

    documents: NDArray[np.integer]
    position: NDArray[np.integer]
    offset: NDArray[np.integer]
    shuffle: NDArray[np.integer]


class Order(Protocol):
    """Interface of an order of samples."""

    lengths: NDArray[np.integer]
    """Number of tokens of each document."""
    seq_length: int

    def locate(self, sample: int) -> tuple[OrderArrays, int]:
        """Return (arrays, index of the sample in them)."""


def open_or_build(cache: Path, key: tuple[object, ...], build: Callable[[], OrderArrays]) -> OrderArrays:
    """Map the arrays for `key`, which must contain everything they depend on; build them if missing or damaged.

    Raises DataError if another process takes too long to build them, or if `cache` can't be created.
    """
    name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
    directory = cache / f"order-{name}"
    arrays = _open(directory)
    if arrays is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.data_cache_path: {cache} can't be made ({error.strerror}): choose another directory"
            ) from error
        busy = f"another process held the lock for {LOCK_TIMEOUT_SECONDS:.0f} s"
        # only taken to build: most starts find the arrays, and a cache may be read-only
        with locked(cache / f"order-{name}.lock", timeout=LOCK_TIMEOUT_SECONDS, busy=busy, error=DataError):
            # another process may have built them while this one waited for the lock
            arrays = _open(directory)
            if arrays is None:
                # map the files instead of using the built arrays, since all ranks of a host share mapped pages
                _write(directory, build())
                arrays = _open(directory)
    if arrays is None:
        raise DataError(f"{directory} can't be read back after writing: check the disk")
    return arrays


def _open(directory: Path) -> OrderArrays | None:
    """Map the arrays; None if they are missing or fail their checksum."""
    try:
        checksums = json.loads((directory / "checksums.json").read_text())
        arrays = [np.asarray(np.load(directory / f"{n}.npy", mmap_mode="r")) for n in OrderArrays._fields]
    except (OSError, ValueError):
        return None
    if [_checksum(array) for array in arrays] != checksums:
        return None
    return OrderArrays(*arrays)


def _write(directory: Path, arrays: OrderArrays) -> None:
    # nothing is synced: checksums detect what a crash damages, and it is built again
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f"{directory.name}.", suffix=".tmp"))
    temporary.chmod(directory.parent.stat().st_mode & 0o777)  # mkdtemp gives access to the owner only
    for name, array in zip(OrderArrays._fields, arrays, strict=True):
        np.save(temporary / f"{name}.npy", array)
    (temporary / "checksums.json").write_text(json.dumps([_checksum(array) for array in arrays]))
    # a directory can only be renamed over an empty one; processes that mapped the old files keep them
    shutil.rmtree(directory, ignore_errors=True)
    try:
        temporary.rename(directory)
    except OSError:  # without working locks, another process may have been faster
        shutil.rmtree(temporary, ignore_errors=True)
        if not directory.exists():
            raise


def _checksum(array: NDArray[np.integer]) -> str:
    # includes type and shape, since they decide what the bytes mean
    return f"{array.dtype.str}{array.shape}{xxhash.xxh3_128_hexdigest(array.data)}"
