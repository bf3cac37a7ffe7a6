"""Durable, atomic file writes, and locks between processes."""

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

_COPY_BYTES = 16 << 20
_SILENT_SECONDS = 1.0
_POLL_SECONDS = 0.02
_WITHOUT_LOCKS = (
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOLCK,
    errno.EIO,  # NFS without its lock daemon
)


def sync_file(file: IO[Any]) -> None:
    """Wait until everything written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the entries of a directory are on the disk; otherwise a crash can undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Wait until all files under a directory are on the disk, with their names."""
    for path in (directory, *directory.rglob("*")):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file and wait until its content is on the disk; its name is durable once the directory is synced."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        sync_file(file)


def replace_durably(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: a crash leaves either the old or the new content, and possibly NAME.tmp next to it."""
    temporary = path.with_name(path.name + ".tmp")
    write_durably(temporary, content)
    temporary.replace(path)
    sync_directory(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace a file by indented JSON, as `replace_durably` does."""
    replace_durably(path, json.dumps(content, indent=1) + "\n")


def concatenate(sources: Sequence[Path], target: Path, may_link: bool = False) -> None:
    """Concatenate files durably; with `may_link`, a single file is hard-linked instead of copied.

    Allow links only for durable files that nothing else writes to: a write to one of the names would change both.
    """
    target.unlink(missing_ok=True)
    if len(sources) == 1 and may_link:
        with suppress(OSError):  # a file system without hard links: copy
            os.link(sources[0], target)
            return
    with target.open("wb") as file:
        for source in sources:
            with source.open("rb") as part:
                shutil.copyfileobj(part, file, _COPY_BYTES)
        sync_file(file)


def take_lock(descriptor: int, timeout: float, on_wait: Callable[[float], None] | None = None) -> bool:
    """Acquire an exclusive flock on an open file or directory; closing the descriptor releases it.

    Returns False if another process holds it for `timeout` seconds; meanwhile `on_wait` is called repeatedly with the
    seconds waited so far. Raises OSError if the file system does not support locks.
    """
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - start
            if waited >= timeout:
                return False
            if on_wait is not None:
                on_wait(waited)
            time.sleep(_POLL_SECONDS)
        else:
            return True


@contextmanager
def locked(path: Path, *, timeout: float, busy: str, error: type[Exception]) -> Iterator[None]:
    """Hold an exclusive lock on `path`. Raises `error` with the message `busy` after `timeout` seconds.

    A wait of more than a second is logged once. The file is not deleted, as that could let two processes in. On a file
    system without locks (Lustre without -o flock, some NFS), logs a warning and continues without one.
    """
    was_logged = False

    def tell(waited: float) -> None:
        nonlocal was_logged
        if waited > _SILENT_SECONDS and not was_logged:
            log.warning("%s: another process holds this lock: waiting up to %.0f s for it", path, timeout)
            was_logged = True

    with path.open("w") as file:
        try:
            is_ours = take_lock(file.fileno(), timeout, tell)
        except OSError as failure:
            if failure.errno not in _WITHOUT_LOCKS:
                raise error(f"{path} can't be locked ({failure.strerror}): is its disk healthy?") from failure
            _warn(path.parent, failure.strerror)
            is_ours = True
        if not is_ours:
            raise error(f"{path}: {busy}")
        yield


@cache
def _warn(directory: Path, reason: str) -> None:
    log.warning(
        "%s: its file system has no locks (%s); continuing without one: do not start another process that writes there",
        directory,
        reason,
    )
