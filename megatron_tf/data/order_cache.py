"""Arrays of an order on disk: built once by whichever process comes first, checked and mapped by all."""

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
    """Where the samples of one epoch, or of a whole run, lie.

    `documents` [d] is their order. The sample at place i begins in document `documents[position[i]]` at `offset[i]`;
    both are [n + 1]. Places are visited in the order of `shuffle` [n]. Ids take 32 bits where that is enough for all.
    """

    documents: NDArray[np.integer]
    position: NDArray[np.integer]
    offset: NDArray[np.integer]
    shuffle: NDArray[np.integer]


class Order(Protocol):
    """An order of samples."""

    lengths: NDArray[np.integer]
    """Tokens of each document."""
    seq_length: int

    def locate(self, sample: int) -> tuple[OrderArrays, int]:
        """(arrays, place in them) of a sample."""


def open_or_build(cache: Path, key: tuple[object, ...], build: Callable[[], OrderArrays]) -> OrderArrays:
    """Mapped arrays of a key that says everything they depend on; what is missing or damaged is built anew.

    Raises DataError where another process takes too long to build them, and where `cache` can't be made.
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
        # only who has to build takes the lock: most starts find the arrays, and a cache may be read-only
        with locked(cache / f"order-{name}.lock", timeout=LOCK_TIMEOUT_SECONDS, busy=busy, error=DataError):
            # another process may have built them while this one waited
            arrays = _open(directory)
            if arrays is None:
                # read back, since mapped pages are shared by all ranks of a host, and those that were built are not
                _write(directory, build())
                arrays = _open(directory)
    if arrays is None:
        raise DataError(f"{directory} can't be read back after it was written: is the disk sound?")
    return arrays


def _open(directory: Path) -> OrderArrays | None:
    """The arrays, None where they are not there or not what was written."""
    try:
        checksums = json.loads((directory / "checksums.json").read_text())
        arrays = [np.asarray(np.load(directory / f"{n}.npy", mmap_mode="r")) for n in OrderArrays._fields]
    except (OSError, ValueError):
        return None
    if [_checksum(array) for array in arrays] != checksums:
        return None
    return OrderArrays(*arrays)


def _write(directory: Path, arrays: OrderArrays) -> None:
    # nothing is synced: what a crash damages, checksums tell, and it is built again
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f"{directory.name}.", suffix=".tmp"))
    temporary.chmod(directory.parent.stat().st_mode & 0o777)  # mkdtemp's is for nobody else
    for name, array in zip(OrderArrays._fields, arrays, strict=True):
        np.save(temporary / f"{name}.npy", array)
    (temporary / "checksums.json").write_text(json.dumps([_checksum(array) for array in arrays]))
    # a directory can only be renamed over an empty one; who has mapped the old files keeps them
    shutil.rmtree(directory, ignore_errors=True)
    try:
        temporary.rename(directory)
    except OSError:  # where there are no locks, another process may have been faster
        shutil.rmtree(temporary, ignore_errors=True)
        if not directory.exists():
            raise


def _checksum(array: NDArray[np.integer]) -> str:
    # with type and shape, since the same bytes are another order under others
    return f"{array.dtype.str}{array.shape}{xxhash.xxh3_128_hexdigest(array.data)}"
