"""Data files that stay open for a whole run, and what can happen to them meanwhile.

A memory map of a file that shrinks, or of a network file system that fails, ends the process with SIGBUS and without a
message. So tokens are read by system calls, which report errors, and indices are mapped but their size is checked.
"""

import errno
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_tf.errors import UserError
from megatron_tf.host import allow_more_files

T = TypeVar("T")

NO_MAPS = (errno.ENODEV, errno.EINVAL, errno.EACCES)  # what mmap returns on file systems without maps


class DataError(UserError):
    """Raised for data that is missing, damaged or in another format; the message names the file and the cause."""


class OpenFile:
    """A file that is open for reading. Raises DataError naming it and the remedy when it shrinks or can't be read."""

    def __init__(self, path: Path, *, remedy: str = "restore it and resume") -> None:
        self.path = path
        self.remedy = remedy
        self._descriptor = _opened(path)
        self.size = os.fstat(self._descriptor).st_size
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from byte `start` on."""
        try:
            content = os.pread(self._descriptor, size, start)
            while len(content) < size:
                more = os.pread(self._descriptor, size - len(content), start + len(content))
                if not more:
                    self.check()
                    raise DataError(f"{self.path} ends before byte {start + size:,}: it is truncated")
                content += more  # a single call reads at most 2 GiB
        except OSError as error:
            raise self._not_read(error) from error
        return content

    def check(self) -> None:
        """Raise DataError if the file has another size than when it was opened."""
        try:
            found = os.lseek(self._descriptor, 0, os.SEEK_END)  # os.fstat takes four times as long
        except OSError as error:
            raise self._not_read(error) from error
        if found != self.size:
            raise DataError(
                f"{self.path} has {found:,} bytes and had {self.size:,} when it was opened: it was truncated or "
                f"rewritten during the run; {self.remedy}"
            )

    def prefetch(self, start: int, size: int) -> None:
        """Ask the operating system to read ahead, without waiting for it."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def mapped(self) -> NDArray[np.uint8]:
        """Return the content as a memory map, [size]; on a file system without maps, as a copy in memory."""
        if self.size == 0:
            return np.empty(0, np.uint8)
        try:
            # a plain array: each slice of an np.memmap would take a microsecond
            return np.frombuffer(
                _with_more_files(lambda: mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)), np.uint8
            )
        except OSError as error:
            if error.errno not in NO_MAPS:
                raise _not_opened(self.path, error) from error
            return np.frombuffer(self.read(0, self.size), np.uint8)

    def _not_read(self, error: OSError) -> DataError:
        return DataError(f"{self.path} can't be read ({error.strerror}): is its disk or server healthy?")


def _opened(path: Path) -> int:
    try:
        return _with_more_files(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise _not_opened(path, error) from error


def _with_more_files(open_one: Callable[[], T]) -> T:
    """Call a function that opens a file; if too many are open, raise the limit and call it again."""
    try:
        return open_one()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    allow_more_files()  # each dataset holds several, and a blend may have thousands
    return open_one()


def _not_opened(path: Path, error: OSError) -> DataError:
    remedy = ": raise the limit of open files (ulimit -n), or merge datasets" if error.errno == errno.EMFILE else ""
    return DataError(f"{path} can't be opened ({error.strerror}){remedy}")
