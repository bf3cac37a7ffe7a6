"""Handling of the signals that stop a run, from its first line on. Imports nothing that is slow."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TRACE_SIGNAL = signal.SIGUSR2
EXIT_START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h

_SAME_INTERRUPT_SECONDS = 0.25  # a terminal and a launcher can both deliver one Ctrl-C


class SignalCatcher:
    """A context in which signals are recorded for the run, and a second Ctrl-C ends the process at once.

    Python runs signal handlers in the main thread, which may be blocked in C++ waiting for other ranks. A separate
    thread therefore reads the signals from the wakeup descriptor, and ends the process.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that requested a stop; 0 for none."""
        self._is_trace_requested = False
        self._code_at_once: Callable[[int], int] | None = None
        self._interrupted_at: float | None = None
        self._before: dict[int, Any] = {}

    def end_at_once(self, code: Callable[[int], int]) -> None:
        """End the process on a signal, received from now on or before, with the exit code `code(signal)`.

        Used before the first step: there is nothing to save yet, and the main thread can be busy for minutes.
        """
        self._code_at_once = code
        if self.number:
            self._end_before_first_step(self.number)

    def stop_at_next_step(self) -> None:
        """Record signals without acting from now on: the ranks of the run stop together at their next step."""
        self._code_at_once = None

    def take_trace_request(self) -> bool:
        """Return whether TRACE_SIGNAL was received since the last call."""
        is_requested, self._is_trace_requested = self._is_trace_requested, False
        return is_requested

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._watch, args=(self._reader,), daemon=True, name="signals").start()
        # no warning if the pipe is full: the thread then has enough to read
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, TRACE_SIGNAL):
            # a shell makes background jobs ignore Ctrl-C
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        os.register_at_fork(after_in_child=self._restore)  # otherwise worker processes could not be terminated
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        os.close(self._writer)  # ends the thread

    def _restore(self) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == TRACE_SIGNAL:
            self._is_trace_requested = True
        else:
            self.number = self.number or number

    def _watch(self, reader: int) -> None:
        while received := os.read(reader, 1):
            number = received[0]
            if number not in STOP_SIGNALS:
                continue
            if self._code_at_once is not None:
                self._end_before_first_step(number)
            if self._is_second_interrupt(number):
                _say_on_first_rank("interrupted a second time: exiting at once, without saving")
                os._exit(exit_code(signal.SIGINT, is_saved=False))
        os.close(reader)

    def _is_second_interrupt(self, number: int) -> bool:
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic() if number == signal.SIGINT else None
            return False
        if number == signal.SIGTERM:  # how torchrun forwards a second Ctrl-C
            return "TORCHELASTIC_RUN_ID" in os.environ
        return number == signal.SIGINT and time.monotonic() - self._interrupted_at > _SAME_INTERRUPT_SECONDS

    def _end_before_first_step(self, number: int) -> None:
        assert self._code_at_once is not None
        _say_on_first_rank(f"stopped by {name_of(number)} before the first step: start the same command again")
        os._exit(self._code_at_once(number))


def exit_code(number: int, *, is_saved: bool) -> int:
    """Return the exit code of a run that a signal stopped: 75, if the same command resumes it, else 128 + number."""
    return EXIT_START_AGAIN if is_saved and number != signal.SIGINT else 128 + number


def name_of(number: int) -> str:
    """Return the signal's name for messages."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _say_on_first_rank(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
