"""Cache of order arrays on disk: built once by the first process, verified and memory-mapped by all."""

import errno
import functools
import hashlib
import io
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_tf.data.open_files import DataError, OpenFile
from megatron_tf.files import locked

log = logging.getLogger(__name__)

LOCK_TIMEOUT_SECONDS = 600.0
_LEFTOVER_SECONDS = 3600.0
_HEADER_BYTES = 4096  # of a .npy file, at most
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


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


class StoredOrder(NamedTuple):
    """Order arrays, and the files that they are mapped from: none if they are in memory."""

    arrays: OrderArrays
    files: Sequence[OpenFile] = ()

    def check(self) -> None:
        """Raise DataError if a file was truncated: reading a part that is gone would end the process with SIGBUS."""
        for file in self.files:
            file.check()


class Order(Protocol):
    """Interface of an order of samples."""

    lengths: NDArray[np.integer]
    """Number of tokens of each document."""
    seq_length: int

    def locate(self, sample: int) -> tuple[OrderArrays, int]:
        """Return (arrays, index of the sample in them)."""


def open_or_build(cache: Path, key: tuple[object, ...], build: Callable[[], OrderArrays]) -> StoredOrder:
    """Map the arrays for `key`, which must contain everything they depend on; build them if missing or damaged.

    If `cache` is read-only, the arrays are built in memory, with one warning for each process and directory. Raises
    DataError if another process takes too long to build them, or if `cache` can't be created.
    """
    name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
    directory = cache / f"order-{name}"
    stored = _open(directory)
    if stored is not None:
        return stored
    try:
        stored = _build_once(directory, build)
    except OSError as error:
        if error.errno in _READ_ONLY:
            _warn_of_memory(cache, error.strerror)
            return StoredOrder(build())
        raise DataError(
            f"data.data_cache_path: {cache} can't be made ({error.strerror}): choose another directory"
        ) from error
    if stored is None:
        raise DataError(f"{directory} can't be read back after writing: check the disk")
    return stored


def _build_once(directory: Path, build: Callable[[], OrderArrays]) -> StoredOrder | None:
    """Build and map the arrays, or map those of another process that was faster. Raises OSError if the directory can't
    be written."""
    cache = directory.parent
    cache.mkdir(parents=True, exist_ok=True)
    busy = f"another process held the lock for {LOCK_TIMEOUT_SECONDS:.0f} s"
    # only taken to build: most starts find the arrays, and a cache may be read-only
    with locked(cache / f"{directory.name}.lock", timeout=LOCK_TIMEOUT_SECONDS, busy=busy, error=DataError):
        # another process may have built them while this one waited for the lock
        stored = _open(directory)
        if stored is None:
            _remove_leftovers(directory)
            # map the files instead of using the built arrays, since all ranks of a host share mapped pages
            _write(directory, build())
            stored = _open(directory)
    return stored


def _remove_leftovers(directory: Path) -> None:
    """Remove what processes that were killed while writing left. Without working locks, a young one may be in use."""
    for leftover in directory.parent.glob(f"{directory.name}.*.tmp"):
        with suppress(OSError):  # another process may remove it too
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(leftover)


@functools.cache
def _warn_of_memory(cache: Path, reason: str) -> None:
    log.warning(
        "%s can't be written to (%s): every process holds the order of samples in its own memory; to share it, set "
        "data.data_cache_path to a directory that can be written to",
        cache,
        reason,
    )


def _open(directory: Path) -> StoredOrder | None:
    """Map the arrays; None if they are missing or fail their checksum."""
    paths = [directory / f"{name}.npy" for name in OrderArrays._fields]
    try:
        checksums = json.loads((directory / "checksums.json").read_text())
        if not all(path.is_file() for path in paths):
            return None
        files = [OpenFile(path, remedy="resume, which builds it again") for path in paths]
        arrays = [_mapped(file) for file in files]
    except (OSError, ValueError, TypeError):
        return None
    if [_checksum(array) for array in arrays] != checksums:
        return None
    return StoredOrder(OrderArrays(*arrays), files)


def _mapped(file: OpenFile) -> NDArray[np.integer]:
    """Map the array of a .npy file. Raises ValueError or TypeError if it is damaged or truncated."""
    content = file.mapped()
    header = io.BytesIO(content[:_HEADER_BYTES].tobytes())
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    return content[header.tell() :].view(dtype).reshape(shape)


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
