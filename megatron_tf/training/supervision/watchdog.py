"""Watchdog over the ranks of a run: which rank is lost or late, on which host, and what it was doing."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from megatron_tf.errors import UserError
from megatron_tf.failures import communication_failure, remedy_for
from megatron_tf.failures import explain as explain_failure
from megatron_tf.training.supervision.diagnosis import explain, responding
from megatron_tf.training.supervision.heartbeats import ALARM, REPORT, Board, Heartbeat

BEAT_SECONDS = 1.0
_PATIENCE_BEATS = 10  # for the report of a lower rank that responds, and for the main thread to fail after a report
_WIDER = 8  # how many times as many ranks a rank looks at next, if those so far are silent


class LostRankError(UserError):
    """A rank no longer responds. The message is empty if another rank reports it."""


class Watchdog:
    """A context in which a thread on every rank publishes this rank's heartbeats in `store`.

    `now` returns the current operation and its start by time.perf_counter. If an operation takes longer than
    `limit_seconds`, or a collective fails, on any rank, `end` is called on all ranks to exit the process, with a
    diagnosis on the lowest responding rank and None on the others. Where the main thread raises a communication error
    first, that becomes a LostRankError with the same diagnosis instead.

    Only the rank that reports reads all heartbeats; the others read as few as tell them that a lower rank responds.
    """

    def __init__(
        self,
        store: dist.Store | None,
        *,
        rank: int,
        size: int,
        now: Callable[[], tuple[str, float]],
        limit_seconds: float,
        end: Callable[[str | None], None],
    ) -> None:
        self.board = None if store is None else Board(store, rank)
        self.rank = rank
        self.size = size
        self.now = now
        self.limit_seconds = limit_seconds
        self.end = end
        self.count = 0
        self.stop = threading.Event()
        self.is_over = threading.Event()
        self.is_alarmed = threading.Event()
        self.is_reported = threading.Event()
        self.watched_thread = threading.get_ident()
        self.position = "", False
        self.report: str | None = None
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        self.listener = threading.Thread(target=self._listen, daemon=True, name="alarm")

    def __enter__(self) -> Self:
        if self.board is not None:
            self.thread.start()
            self.listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        if self.board is None:
            return
        try:
            self.thread.join(timeout=BEAT_SECONDS)
            if error is None:
                return
            failure = communication_failure(error)
            if failure is not None:
                raise LostRankError(self._say_of(error, failure)) from error
            self._tell_end(error)
        finally:
            self.is_over.set()
            self.listener.join(timeout=BEAT_SECONDS)

    def _say_of(self, error: BaseException, failure: str) -> str:
        """Describe a failed collective; empty if another rank describes it.

        gloo fails only if another rank is gone; NCCL also fails for reasons that only this rank knows.
        """
        if "NCCL" not in failure:
            return self.report or self._diagnose(f"({failure})") or self.report or ""
        diagnosis = self.report or self._diagnose(f"({failure})", is_known_to_all=False) or self.report
        self._tell_end(failure)
        return f"{diagnosis}: {remedy_for(failure)}" if diagnosis else str(explain_failure(error))

    def _tell_end(self, reason: object) -> None:
        """Send a last heartbeat, so that the others report this reason rather than a silent rank."""
        beat = self._beat(f"ended in {self.now()[0]}: {reason}", 0.0, ("", False))
        self._tell(replace(beat, has_ended=True))

    def _watch(self) -> None:
        while not self.stop.wait(BEAT_SECONDS):
            if self._tell_position() > self.limit_seconds:
                self.end(self._diagnose(f"(the limit of {self.limit_seconds:.0f} s is reached)"))
            elif self.is_alarmed.is_set():
                self._follow_alarm()

    def _follow_alarm(self) -> None:
        """Report a fault that another rank noticed, if this is the rank that does, and end the process.

        Where the collective of the main thread fails because the others exit, that thread ends it, and closes the logs.
        """
        report = self._diagnose(None)
        if not self.stop.wait(_PATIENCE_BEATS * BEAT_SECONDS):
            self.end(report)

    def _listen(self) -> None:
        """Wait for an alarm and then for its report. In a thread of its own: a frozen store would block it."""
        with contextlib.suppress(RuntimeError):  # the host of the store is gone, which every rank will notice
            is_set = self._board().listener()  # here, as connecting can take seconds when many ranks start
            for key, event in ((ALARM, self.is_alarmed), (REPORT, self.is_reported)):
                while not is_set(key):
                    if self.is_over.wait(BEAT_SECONDS):
                        return
                event.set()

    def _tell_position(self) -> float:
        """Send a heartbeat with the operation and the line of the watched thread; return the operation's seconds."""
        beat = self._current_beat()
        self._tell(beat)
        return beat.seconds

    def _current_beat(self) -> Heartbeat:
        operation, since = self.now()
        seconds = time.perf_counter() - since
        # once the thread has failed, where it was: if another rank exits first, the collective here fails, and this
        # rank must still count as one that waited
        if not self.stop.is_set():
            frame = sys._current_frames().get(self.watched_thread)  # it may be blocked in C++ and unable to report
            self.position = ("", False) if frame is None else _place_of(frame)
        return self._beat(operation, seconds, self.position)

    def _beat(self, operation: str, seconds: float, position: tuple[str, bool]) -> Heartbeat:
        self.count += 1
        place, is_waiting = position
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
        with contextlib.suppress(RuntimeError):  # the host of the store is gone, which every rank will notice
            self._board().publish(beat)

    def _diagnose(self, symptom: str | None, *, is_known_to_all: bool = True) -> str | None:
        """Return which ranks block the run; None if another rank reports it.

        The symptom is that of the alarm if it is None. If `is_known_to_all`, the others are alarmed, and the report of
        a lower rank is waited for, so that one is made even if that rank is lost, too.
        """
        board = self._board()
        try:
            if symptom is None:
                symptom = board.symptom()
            elif is_known_to_all:
                board.raise_alarm(symptom)
            patience = _PATIENCE_BEATS * BEAT_SECONDS if is_known_to_all else 0.0
            report = self._report(symptom) if self._has_to_report(patience) else None
            if report is None and is_known_to_all:
                self._leave()
        except RuntimeError:
            if self.is_reported.is_set():
                return None
            return f"the rank that hosts the run's store, usually rank 0, is gone or frozen {symptom or ''}".rstrip()
        return report

    def _has_to_report(self, patience: float) -> bool:
        """Wait up to `patience` seconds for the report of a lower rank; return whether no lower rank responds."""
        start, stop = 0, 1
        deadline = time.monotonic() + patience
        while start < self.rank and not self.is_reported.is_set():
            candidates = range(start, min(stop, self.rank))
            before = self._board().read(candidates)
            self._pause()
            able = responding(before, self._board().read(candidates))
            if not able:
                # rank 0, then 7 ranks, then 56: few reads while most ranks respond, few rounds if a rack is lost
                start, stop = stop, _WIDER * stop
            elif time.monotonic() < deadline:
                start, stop = able[0], able[0] + 1
            else:
                return False
        return not self.is_reported.is_set()

    def _report(self, symptom: str) -> str | None:
        """Return the diagnosis from all heartbeats; None if a lower rank responds after all, or has reported."""
        board, everyone = self._board(), range(self.size)
        before = board.read(everyone)
        self._pause()
        after = board.read(everyone)
        report = explain(before, after, rank=self.rank, symptom=symptom)
        if report is None or not board.claim_report():
            return None
        self.report = report  # first, as the main thread may fail while this one waits
        self._wait_for_others(len(responding(before, after)) - 1)
        return report

    def _pause(self) -> None:
        """Wait for three heartbeats, so that a rank that is only late does not count as frozen; less if one reports."""
        deadline = time.monotonic() + 3 * BEAT_SECONDS
        while time.monotonic() < deadline and not self.is_reported.wait(BEAT_SECONDS / 2):
            self._tell_position()  # this rank's own heartbeats must continue, too

    def _wait_for_others(self, count: int) -> None:
        """Wait for three heartbeats, or until `count` ranks know of the report: this rank may host their store."""
        deadline = time.monotonic() + 3 * BEAT_SECONDS
        with contextlib.suppress(RuntimeError):  # another rank hosts it and has exited: the report still counts
            while time.monotonic() < deadline and self._board().num_confirmed() < count:
                time.sleep(BEAT_SECONDS / 10)

    def _leave(self) -> None:
        """Tell the rank that reports, or will report, that this one exits."""
        if self.is_reported.is_set():
            self._board().confirm_report()
        else:
            self._board().publish(replace(self._current_beat(), has_left=True))

    def _board(self) -> Board:
        assert self.board is not None
        return self.board


def _place_of(frame: FrameType) -> tuple[str, bool]:
    """Return the innermost line, and whether it waits for other ranks."""
    file = Path(frame.f_code.co_filename)
    waits = "torch/distributed/" in file.as_posix() or (file.parent.name, file.name) == ("parallel", "collectives.py")
    return f"{file.name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
