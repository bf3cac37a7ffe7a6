"""Files that are written once from start to end, past the page cache where the file system allows it."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

from megatron_tf.files import sync_file

BLOCK_BYTES = 1 << 20
"""Bytes written at a time; a multiple of every alignment that O_DIRECT asks for."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


class SequentialFile:
    """A new file to append to; it is durable after `finish`.

    The page cache takes a copy and a page for each 4 KiB: more time than a fast disk needs, and memory that other
    processes use for what they read. Blocks of BLOCK_BYTES from aligned memory bypass it (O_DIRECT of Linux); a file
    system without that, and the last bytes of the file, go through it. Raises OSError, as of `open` and `write`.
    """

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        """Bytes that the system has accepted."""
        self.file = path.open("xb", buffering=0)
        self._buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))  # anonymous memory is aligned to pages
        self._filled = 0
        self._is_direct = False

    def append(self, data: bytes | memoryview) -> None:
        """Append bytes; they reach the system in blocks."""
        left = memoryview(data)
        while left:
            count = min(len(left), BLOCK_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = left[:count]
            self._filled += count
            left = left[count:]
            if self._filled == BLOCK_BYTES:
                if self.bytes == 0:  # only now: smaller files are no faster without the page cache
                    self._set_direct(True)
                self._write()

    def finish(self) -> None:
        """Write the last bytes, wait until all are on the disk, and close the file."""
        self._set_direct(False)  # the rest is not a whole block
        self._write()
        sync_file(self.file)
        self.close()

    @property
    def is_closed(self) -> bool:
        """Whether the file is closed."""
        return self.file.closed

    def close(self) -> None:
        """Close the file as it is."""
        self.file.close()
        self._buffer.release()

    def _write(self) -> None:
        left = self._buffer[: self._filled]
        while left:  # an unbuffered write may be partial
            try:
                count = self.file.write(left)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._set_direct(False)  # a file system that accepts the flag, but not the write
                continue
            self.bytes += count
            left = left[count:]
        self._filled = 0

    def _set_direct(self, is_direct: bool) -> None:
        """Switch O_DIRECT on, if the file system has it, or off."""
        flags = fcntl.fcntl(self.file, fcntl.F_GETFL) & ~_O_DIRECT
        try:
            fcntl.fcntl(self.file, fcntl.F_SETFL, flags | (_O_DIRECT if is_direct else 0))
            self._is_direct = is_direct
        except OSError:
            if not is_direct:
                raise
