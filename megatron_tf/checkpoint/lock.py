"""Lock of a run's checkpoint directory, so that only one run writes to it, on any file system.

Kernel locks (flock) are not visible between the nodes of some network file systems. A file created by link() is. Its
owner is considered alive if its process exists on this machine, or, on another machine, if the modification time of
the file is recent; a thread of the owner keeps updating it.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from megatron_tf.errors import UserError
from megatron_tf.files import take_lock
from megatron_tf.parallel.launch import job_name

log = logging.getLogger(__name__)

LOCK = ".lock"
BEAT_SECONDS = 2.5
STALE_SECONDS = 15.0  # without a heartbeat from another machine; six heartbeats, as some file systems cache times
LEFTOVER_SECONDS = 60.0
"""Temporary files of taking or replacing a lock exist for milliseconds; older ones are left over from a crash."""
_LEFTOVER = re.compile(rf"{re.escape(LOCK)}\.[0-9a-f]{{32}}")


class LockedError(UserError):
    """Raised if another run is writing to the directory."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str
    machine: str
    """Boot id of the kernel and its process id namespace, within which `process` is meaningful."""
    process: int
    started: str
    """Start time of the process as counted by the kernel, since process ids are reused."""
    job: str
    token: str
    """Unique id of this lock."""

    @property
    def is_here(self) -> bool:
        """Return whether the process is on this machine."""
        return self.machine != "" and self.machine == _machine()

    @property
    def is_running(self) -> bool:
        """Return whether the process is alive; only meaningful if it `is_here`."""
        return _start_of(self.process) == self.started


class RunLock:
    """Lock held while the context is entered. If another run takes it over, a thread calls `on_lost` with a message.

    Entering takes over the lock of a dead run, and removes temporary files left by a crash. Raises LockedError if the
    owner is alive; for an owner on another machine, finding out takes up to STALE_SECONDS and is announced in the log.
    Raises OSError if the directory is not writable. Messages name `key`, by which the user chose the directory.
    """

    def __init__(self, root: Path, on_lost: Callable[[str], None], *, key: str = "checkpoint.save") -> None:
        self.root = root
        self.key = key
        self.path = root / LOCK
        self.on_lost = on_lost
        self.owner = _this_process()
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self.root):
            while not self._create() or self._is_in_place_of_another():
                self._remove_if_dead()
            self._remove_leftovers()
        threading.Thread(target=self._keep_fresh, daemon=True, name="run-lock").start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()

    def _create(self) -> bool:
        """Try to create the lock atomically, including its contents; return whether it was free."""
        text = json.dumps(asdict(self.owner))
        draft = self.path.with_name(f"{LOCK}.{self.owner.token}")
        _write_new(draft, text)
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                _write_new(self.path, text)
            except FileExistsError:
                return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _remove_if_dead(self) -> None:
        try:
            before = self.path.read_bytes()
        except FileNotFoundError:
            return
        owner = _parse(before)
        is_here = owner is not None and owner.is_here
        if not is_here:
            log.warning(
                "%s: %s is locked by %s: waiting up to %.0f s to see whether that run is alive",
                self.key,
                self.root,
                _name(owner),
                STALE_SECONDS,
            )
        is_alive = owner.is_running if owner is not None and is_here else self._beats(before)
        if is_alive:
            raise LockedError(self._refusal(owner))
        # rename first: of two that find the same dead lock only one gets it, and a live lock is put back
        aside = self.path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if aside.read_bytes() != before:
                self._put_back(aside)
            aside.unlink(missing_ok=True)

    def _put_back(self, aside: Path) -> None:
        """Put back the lock of a live run; a process that took its place in the meantime sees `aside` and gives way."""
        for _ in range(100):
            try:
                os.link(aside, self.path)
            except FileExistsError:
                time.sleep(0.02)
            except OSError:  # a file system without links
                aside.rename(self.path)
                return
            else:
                return

    def _is_in_place_of_another(self) -> bool:
        """Return whether another process is about to put back the lock of a live run, which is why the name was free;
        if so, remove the lock taken here."""
        for path in self._surroundings():
            try:
                owner = _parse(path.read_bytes())
                now = self.path.stat().st_mtime
                changed = path.stat().st_mtime
            except FileNotFoundError:
                continue
            if owner is None or owner.token == self.owner.token or path.name.endswith(owner.token):
                continue  # a temporary file, or this lock itself
            if now - changed > STALE_SECONDS or (owner.is_here and not owner.is_running):
                continue  # the owner is dead
            if self._is_ours():
                self.path.unlink(missing_ok=True)
            time.sleep(0.05)
            return True
        return False

    def _surroundings(self) -> list[Path]:
        """Return the temporary files of locks that are being taken or replaced."""
        return [path for path in self.root.glob(f"{LOCK}.*") if _LEFTOVER.fullmatch(path.name)]

    def _remove_leftovers(self) -> None:
        """Remove temporary files of processes that died, judged by the file system's clock."""
        with contextlib.suppress(OSError):
            now = self.path.stat().st_mtime
            for path in self._surroundings():
                if now - path.lstat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink(missing_ok=True)

    def _beats(self, text: bytes) -> bool:
        """Return whether the file's modification time changes; no clock is read, because machines' clocks differ."""
        deadline = time.monotonic() + STALE_SECONDS
        try:
            first = self._time()
            while time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 10)
                if self._time() != first and self.path.read_bytes() == text:
                    return True
        except FileNotFoundError:  # released meanwhile
            pass
        return False

    def _time(self) -> int:
        with self.path.open("rb") as file:  # opening the file makes network file systems ask their server
            return os.fstat(file.fileno()).st_mtime_ns

    def _refusal(self, owner: Owner | None) -> str:
        return (
            f"{self.key}: another run is writing to {self.root} ({_name(owner)}): stop that one first, "
            f"or choose another {self.key}"
        )

    def _keep_fresh(self) -> None:
        misses = 0  # one may be while another process puts this lock back
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a server that is away for a while
                misses = 0 if self._is_ours() else misses + 1
                if misses > 1:
                    self.on_lost(f"{self.key}: another run took over {self.root}, because this one was stalled")
                    return
                if not misses:
                    os.utime(self.path)

    def _is_ours(self) -> bool:
        try:
            owner = _parse(self.path.read_bytes())
        except FileNotFoundError:
            return False
        return owner is not None and owner.token == self.owner.token


def _write_new(path: Path, text: str) -> None:
    """Write a new file, or leave none. Raises FileExistsError if there is one, or another OSError that names it."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise
    except OSError as error:  # of a write, which does not name the file
        with contextlib.suppress(OSError):
            path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Serialize the processes that take the lock of a directory if its file system has kernel locks; otherwise only
    the order of renames decides."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # the file system has no kernel locks
            take_lock(descriptor, 2 * STALE_SECONDS)  # the holder may wait that long for a heartbeat
        yield
    finally:
        os.close(descriptor)


def _name(owner: Owner | None) -> str:
    if owner is None:
        return "an unknown process"
    return f"process {owner.process} on {owner.host}{owner.job and f', job {owner.job}'}"


def _this_process() -> Owner:
    process = os.getpid()
    return Owner(
        host=socket.gethostname(),
        machine=_machine(),
        process=process,
        started=_start_of(process),
        job=job_name(),
        token=uuid.uuid4().hex,
    )


def _machine() -> str:
    """Return the boot id and process id namespace; empty if the system does not provide them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_of(process: int) -> str:
    """Return the start time of a process; empty if it has ended, even if it is still a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _parse(text: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None
