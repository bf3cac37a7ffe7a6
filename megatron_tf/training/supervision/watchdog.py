"""Watching over the ranks of a run: which of them is gone or late, where it runs and what it was doing."""

import contextlib
import json
import os
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from megatron_tf.errors import UserError

BEAT_SECONDS = 1.0
_LISTED = 4  # ranks that a message lists


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself, about once a second."""

    host: str
    process: int
    count: int
    """Beats so far."""
    operation: str
    seconds: float
    """Since the operation began."""
    place: str
    """Innermost line of the main thread."""
    is_waiting: bool
    """Whether that line is one that waits for other ranks."""


class LostRankError(UserError):
    """A rank that no longer answers; without a message where another rank says which."""


class Watchdog:
    """A thread on every rank that tells the others through `store` what this one does, as long as it is entered.

    `now` gives the present operation and since when it is under way, by time.perf_counter. An operation that takes
    longer than `limit_seconds` ends the process: `end` gets a sentence about who is to blame, on one of the ranks that
    are left, and None on the others. Errors of communication become a LostRankError that says the same.
    """

    def __init__(
        self,
        store: dist.Store | None,
        *,
        now: Callable[[], tuple[str, float]],
        limit_seconds: float,
        end: Callable[[str | None], None],
    ) -> None:
        self.store = None if store is None else store.clone()  # type: ignore[attr-defined]  # a store serves one thread at a time
        self.rank, self.size = (0, 1) if store is None else (dist.get_rank(), dist.get_world_size())
        self.now = now
        self.limit_seconds = limit_seconds
        self.end = end
        self.count = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True, name="watch")

    def __enter__(self) -> Self:
        if self.store is not None:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        if self.store is None:
            return
        self.thread.join(timeout=BEAT_SECONDS)
        if error is None:
            return
        if _is_of_communication(error):
            diagnosis = self._diagnose(f"({textwrap.shorten(str(error), 160)})")
            raise LostRankError(diagnosis or "") from error
        # the last beat, so that the others name this error and not a rank that fell silent
        self._tell(self._beat(f"ended in {self.now()[0]}: {error}", 0.0, None))

    def _watch(self, main_thread: int) -> None:
        while not self.stop.wait(BEAT_SECONDS):
            operation, since = self.now()
            seconds = time.perf_counter() - since
            # where the main thread is: it can wait in C++ for ever, and not say so itself
            self._tell(self._beat(operation, seconds, sys._current_frames().get(main_thread)))
            if seconds > self.limit_seconds:
                self.end(self._diagnose(f"(the limit of {self.limit_seconds:.0f} s is reached)"))

    def _beat(self, operation: str, seconds: float, frame: FrameType | None) -> Heartbeat:
        self.count += 1
        place, is_waiting = ("", False) if frame is None else _place_of(frame)
        return Heartbeat(
            host=socket.gethostname(),
            process=os.getpid(),
            count=self.count,
            operation=operation,
            seconds=seconds,
            place=place,
            is_waiting=is_waiting,
        )

    def _tell(self, beat: Heartbeat) -> None:
        with contextlib.suppress(RuntimeError):  # whoever kept the store is gone, which every rank will notice
            self._store().set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def _diagnose(self, symptom: str) -> str | None:
        """Who blocks the run; None on all ranks but one that can say so."""
        try:
            before = self._beats()
            # for three beats, so that a rank that is only late is not taken for frozen
            deadline = time.monotonic() + 3 * BEAT_SECONDS
            while time.monotonic() < deadline:  # this rank's own beat must be seen to continue, too
                time.sleep(BEAT_SECONDS / 2)
                operation, since = self.now()
                frame = sys._current_frames().get(threading.main_thread().ident or 0)
                self._tell(self._beat(operation, time.perf_counter() - since, frame))
            after = self._beats()
        except RuntimeError:
            return f"the rank that kept the run's store, usually rank 0, is gone {symptom}"
        return explain(before, after, rank=self.rank, symptom=symptom)

    def _beats(self) -> dict[int, Heartbeat | None]:
        keys = {rank: f"beat/{rank}" for rank in range(self.size)}
        there = {rank: self._store().check([key]) for rank, key in keys.items()}
        texts = {rank: self._store().get(key) for rank, key in keys.items() if there[rank]}
        return {rank: Heartbeat(**json.loads(texts[rank])) if rank in texts else None for rank in keys}

    def _store(self) -> dist.Store:
        assert self.store is not None
        return self.store


def explain(
    before: Mapping[int, Heartbeat | None], after: Mapping[int, Heartbeat | None], *, rank: int, symptom: str
) -> str | None:
    """A sentence about the ranks that others wait for, from two looks at all beats, some seconds apart.

    To blame are those whose beat stood still, else those that failed, else those that do something other than wait.
    None where a lower rank than this one is left to say it.
    """
    silent = [r for r, beat in after.items() if beat is None or (beat == before[r] and not _has_ended(beat))]
    ended = [r for r, beat in after.items() if beat is not None and _has_ended(beat)]
    left = [r for r in after if r not in silent and r not in ended]
    if left and rank != min(left):
        return None
    busy = [r for r in left if (beat := after[r]) is not None and not beat.is_waiting]
    if silent:
        return f"{_list(silent, after, 'is gone or frozen, last heard of in')} {symptom}"
    if ended:
        return f"{_list(ended, after, 'has')} {symptom}"
    if busy and len(busy) < len(left):
        return f"{_list(busy, after, 'keeps the others waiting, in')} {symptom}"
    return f"all ranks are blocked: {_list(left, after, 'is in')} {symptom}"


def _list(ranks: Sequence[int], beats: Mapping[int, Heartbeat | None], verb: str) -> str:
    texts = []
    for rank in ranks[:_LISTED]:
        beat = beats[rank]
        if beat is None:
            texts.append(f"rank {rank} never began")
        else:
            where = f", at {beat.place}" if beat.place else ""
            duration = "" if _has_ended(beat) else f" for {beat.seconds:.0f} s"
            texts.append(f"rank {rank} (host {beat.host}, pid {beat.process}) {verb} {beat.operation}{duration}{where}")
    more = len(ranks) - _LISTED
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")


def _has_ended(beat: Heartbeat) -> bool:
    return beat.operation.startswith("ended")


def _place_of(frame: FrameType) -> tuple[str, bool]:
    """(innermost line, whether it waits for other ranks)."""
    file = Path(frame.f_code.co_filename)
    waits = "torch/distributed/" in file.as_posix() or (file.parent.name, file.name) == ("parallel", "collectives.py")
    return f"{file.name}:{frame.f_lineno} in {frame.f_code.co_name}", waits


def _is_of_communication(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
