"""A lock between processes, and what becomes of it on file systems that have none."""

import errno
import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from megatron_tf.data.indexed_dataset import DataError

log = logging.getLogger(__name__)

_SILENT_SECONDS = 1.0
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def locked(path: Path, timeout: float, busy: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`. Raises DataError with `busy` where another process holds it for longer.

    A wait of more than a second is announced, once. The file stays: to remove it could let two processes in.
    On a file system without locks (Lustre without -o flock, some NFS) work continues without one, after a warning.
    """
    began, is_told = time.monotonic(), False
    with path.open("w") as file:
        while not _try(path, file.fileno()):
            waited = time.monotonic() - began
            if waited >= timeout:
                raise DataError(f"{path}: {busy}")
            if waited > _SILENT_SECONDS and not is_told:
                log.warning("%s: another process holds this lock: waiting up to %.0f s for it", path, timeout)
                is_told = True
            time.sleep(0.05)
        yield


def _try(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise DataError(f"{path} can't be locked ({error.strerror}): is its disk healthy?") from error
        _warn(path.parent, error.strerror)
    return True


@cache
def _warn(directory: Path, reason: str) -> None:
    log.warning(
        "%s: its file system has no locks (%s); continuing without one: start no second process that writes there",
        directory,
        reason,
    )
