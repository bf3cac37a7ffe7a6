"""The signals that stop a run, caught from its first line on. Imports nothing that takes time."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TRACE_SIGNAL = signal.SIGUSR2
EXIT_START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h

_SAME_INTERRUPT_SECONDS = 0.25  # a terminal and a launcher can both deliver one Ctrl-C


class SignalCatcher:
    """While it is entered, signals are noted for the run to read, and a second Ctrl-C ends the process at once.

    Python runs its handlers in the main thread, which can wait in C++ for other ranks. A thread therefore reads the
    signals from the wakeup descriptor, and is what ends the process.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that requested a stop; 0 for none."""
        self._is_trace_requested = False
        self._code_at_once: Callable[[int], int] | None = None
        self._interrupted_at: float | None = None
        self._before: dict[int, Any] = {}

    def end_at_once(self, code: Callable[[int], int]) -> None:
        """From now on, and if a stop was requested before, a signal ends the process with `code` of it: there is
        nothing to save yet, and the main thread can be busy for minutes."""
        self._code_at_once = code
        if self.number:
            self._end_before_first_step(self.number)

    def stop_at_next_step(self) -> None:
        """From now on a signal is noted for the run, whose ranks stop together."""
        self._code_at_once = None

    def take_trace_request(self) -> bool:
        """Whether TRACE_SIGNAL came since the last call."""
        is_requested, self._is_trace_requested = self._is_trace_requested, False
        return is_requested

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._watch, args=(self._reader,), daemon=True, name="signals").start()
        # no warning where the pipe is full: then the thread has enough to read
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, TRACE_SIGNAL):
            # a shell lets a job in the background ignore Ctrl-C
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        os.register_at_fork(after_in_child=self._restore)  # else nothing could terminate a worker process
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
                _say_on_first_rank("interrupted a second time: ended at once, what was not saved before is lost")
                os._exit(exit_code(signal.SIGINT, is_saved=False))
        os.close(reader)

    def _is_second_interrupt(self, number: int) -> bool:
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic() if number == signal.SIGINT else None
            return False
        if number == signal.SIGTERM:  # how torchrun hands on a second Ctrl-C
            return "TORCHELASTIC_RUN_ID" in os.environ
        return number == signal.SIGINT and time.monotonic() - self._interrupted_at > _SAME_INTERRUPT_SECONDS

    def _end_before_first_step(self, number: int) -> None:
        assert self._code_at_once is not None
        _say_on_first_rank(f"stopped by {name_of(number)} before the first step: start the same command again")
        os._exit(self._code_at_once(number))


_active: SignalCatcher | None = None


def catch_from_first_line() -> None:
    """Catch signals until the process ends: for modules that are run as a script, before their imports."""
    global _active
    _active = SignalCatcher().__enter__()


@contextlib.contextmanager
def caught_signals() -> Iterator[SignalCatcher]:
    """The catcher of `catch_from_first_line`, or one for as long as the context lasts."""
    if _active is not None:
        yield _active
    else:
        with SignalCatcher() as catcher:
            yield catcher


def exit_code(number: int, *, is_saved: bool) -> int:
    """The code of a run that a signal stopped: 75 says that the same command continues it, as launchers take it."""
    return EXIT_START_AGAIN if is_saved and number != signal.SIGINT else 128 + number


def name_of(number: int) -> str:
    """What people call the signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _say_on_first_rank(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
