"""One run at a time writes into a directory of checkpoints, on any file system: a file that says who, kept fresh.

The kernel's locks (flock) are not visible between the nodes of some network file systems. A file made by link() is, and
its owner is known to be alive by its process where it is on this machine, and else by the file's time, which a thread
of the owner renews.
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
STALE_SECONDS = 15.0  # without a beat, of an owner on another machine; six beats, for file systems that cache times
LEFTOVER_SECONDS = 60.0
"""Files that a lock is made of, or is replaced by, exist for milliseconds; older ones are of a crash."""
_LEFTOVER = re.compile(rf"{re.escape(LOCK)}\.[0-9a-f]{{32}}")


class LockedError(UserError):
    """Another run writes there."""


@dataclass(frozen=True)
class Owner:
    """The process behind a lock."""

    host: str
    machine: str
    """The boot of the kernel and its namespace of process ids: where `process` means something."""
    process: int
    started: str
    """When the process began, as the kernel counts it: numbers of processes are used again."""
    job: str
    token: str
    """Tells this lock from any other."""

    @property
    def is_here(self) -> bool:
        """Whether its process is one of this machine's."""
        return self.machine != "" and self.machine == _machine()

    @property
    def is_running(self) -> bool:
        """Whether the process lives; only of one that `is_here`."""
        return _start_of(self.process) == self.started


class RunLock:
    """Held while it is entered; `on_lost` gets a sentence, in another thread, where somebody else took it over.

    Entering takes over the lock of a run that is dead, and removes the files that a crash in the middle of that left.
    Raises LockedError where one is alive, which for a run on another machine takes up to STALE_SECONDS to tell and is
    announced in the log, and OSError where the directory can't be written.
    """

    def __init__(self, root: Path, on_lost: Callable[[str], None]) -> None:
        self.root = root
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
        """Whether there was no lock and this one is now there, from the first instant with its contents."""
        text = json.dumps(asdict(self.owner))
        draft = self.path.with_name(f"{LOCK}.{self.owner.token}")
        draft.write_text(text)
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with self.path.open("x") as file:
                    file.write(text)
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
                "checkpoint.save: %s has a lock of %s: waiting up to %.0f s to see whether that run is alive",
                self.root,
                _name(owner),
                STALE_SECONDS,
            )
        is_alive = owner.is_running if owner is not None and is_here else self._beats(before)
        if is_alive:
            raise LockedError(self._refusal(owner))
        # renamed first: of two that find the same dead lock one takes it, and a new lock is put back
        aside = self.path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if aside.read_bytes() != before:
                self._put_back(aside)
            aside.unlink(missing_ok=True)

    def _put_back(self, aside: Path) -> None:
        """A lock of a live run; who took its name in the meantime sees `aside`, and makes room."""
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
        """Whether the name was only free as another process is about to put back the lock of a live run; then this one
        is removed."""
        for path in self._surroundings():
            try:
                owner = _parse(path.read_bytes())
                now = self.path.stat().st_mtime
                changed = path.stat().st_mtime
            except FileNotFoundError:
                continue
            if owner is None or owner.token == self.owner.token or path.name.endswith(owner.token):
                continue  # a draft, or this lock itself
            if now - changed > STALE_SECONDS or (owner.is_here and not owner.is_running):
                continue  # of a run that is dead
            if self._is_ours():
                self.path.unlink(missing_ok=True)
            time.sleep(0.05)
            return True
        return False

    def _surroundings(self) -> list[Path]:
        """Locks that are not yet or no longer under their name."""
        return [path for path in self.root.glob(f"{LOCK}.*") if _LEFTOVER.fullmatch(path.name)]

    def _remove_leftovers(self) -> None:
        """Drafts and renamed locks of processes that died, by the file system's clock."""
        with contextlib.suppress(OSError):
            now = self.path.stat().st_mtime
            for path in self._surroundings():
                if now - path.lstat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink(missing_ok=True)

    def _beats(self, text: bytes) -> bool:
        """Whether somebody keeps the file fresh, by its own time: clocks of machines differ."""
        first, deadline = self._time(), time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 10)
            with contextlib.suppress(FileNotFoundError):
                if self._time() != first and self.path.read_bytes() == text:
                    return True
                continue
            return False
        return False

    def _time(self) -> int:
        with self.path.open("rb") as file:  # network file systems look at their server when a file is opened
            return os.fstat(file.fileno()).st_mtime_ns

    def _refusal(self, owner: Owner | None) -> str:
        return (
            f"checkpoint.save: another run writes into {self.root} ({_name(owner)}): end that one first, "
            f"or choose another checkpoint.save"
        )

    def _keep_fresh(self) -> None:
        misses = 0  # one may be while another process puts this lock back
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a server that is away for a while
                misses = 0 if self._is_ours() else misses + 1
                if misses > 1:
                    self.on_lost(f"checkpoint.save: another run took over {self.root}, as this one stood still")
                    return
                if not misses:
                    os.utime(self.path)

    def _is_ours(self) -> bool:
        try:
            owner = _parse(self.path.read_bytes())
        except FileNotFoundError:
            return False
        return owner is not None and owner.token == self.owner.token


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Of the processes that take the lock of a directory, let in one after the other where its file system has kernel
    locks; elsewhere the order of renames decides alone."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no kernel locks here
            take_lock(descriptor, 2 * STALE_SECONDS)  # who is inside may wait for a beat that long
        yield
    finally:
        os.close(descriptor)


def _name(owner: Owner | None) -> str:
    if owner is None:
        return "a process that it does not name"
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
    """Empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_of(process: int) -> str:
    """Empty for a process that has ended, though its parent may not have noticed."""
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
