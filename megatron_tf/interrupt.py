"""Ctrl-C for commands: one line and exit code 130, after what the command itself cleans up."""

import contextlib
import signal
import sys
from collections.abc import Callable

EXIT_INTERRUPTED = 128 + signal.SIGINT


def run_command(main: Callable[[], int]) -> int:
    """The exit code of a command's `main`; interrupted from the keyboard, 130 and a line. Whatever it began, `main`
    removes or keeps on its way out."""
    try:
        return main()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("interrupted: start the same command again", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
