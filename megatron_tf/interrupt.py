"""Ctrl-C for commands: one line and exit code 130, after what the command itself cleans up."""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

EXIT_INTERRUPTED = 128 + signal.SIGINT


def end_at_interrupt() -> None:
    """Let Ctrl-C end the process at once, with the line: for modules that are run as a script, before their imports,
    which take seconds and answer a KeyboardInterrupt with errors of their own. `run_command` ends that."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell lets a job ignore it
        signal.signal(signal.SIGINT, _end)


def import_late(module: str) -> None:
    """Import what takes seconds, for a command that does so late; Ctrl-C ends the process at once meanwhile. Raises
    ImportError."""
    before = signal.getsignal(signal.SIGINT)
    end_at_interrupt()
    try:
        importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)


def run_command(main: Callable[[], int]) -> int:
    """The exit code of a command's `main`; interrupted from the keyboard, 130 and a line. Whatever it began, `main`
    removes or keeps on its way out."""
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main()
    except KeyboardInterrupt:
        _say()
        return EXIT_INTERRUPTED


def _end(number: int, frame: FrameType | None) -> None:
    _say()
    os._exit(EXIT_INTERRUPTED)


def _say() -> None:
    with contextlib.suppress(OSError):
        print("interrupted: start the same command again", file=sys.stderr, flush=True)
