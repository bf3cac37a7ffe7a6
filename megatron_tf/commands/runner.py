"""Runs a command: prints its errors, sets its exit code, handles Ctrl-C, and reports to torchrun.

All commands share one policy. An error that the user can fix, a failure of the machine included, is printed as one line
`error: ...` without a traceback, and the command exits with the error's exit code, 1 by default. Ctrl-C prints one line
and exits with 130. Anything else is a bug of ours and keeps its traceback. This module imports nothing slow.
"""

import contextlib
import errno
import functools
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from megatron_tf.commands.registry import COMMANDS
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by
from megatron_tf.failures import LESS_MEMORY, explain
from megatron_tf.training.supervision.signals import SignalCatcher

EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells count it
INTERRUPTED = "interrupted: start the same command again"

Main = Callable[..., int]
"""Takes the command's arguments, by default those of the process, and its own keywords; returns the exit code."""


def command(*, interrupted: str = INTERRUPTED, less_memory: str = LESS_MEMORY) -> Callable[[Main], Main]:
    """Decorate the `main` of a command so that user errors and Ctrl-C are printed and become exit codes.

    `interrupted` is the line printed after Ctrl-C, `less_memory` the remedy if memory runs out. Cleaning up unfinished
    work is left to the command.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(arguments: list[str] | None = None, **options: Any) -> int:
            try:
                if signal.getsignal(signal.SIGINT) is _end:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                return main(arguments, **options)
            except KeyboardInterrupt:
                say(interrupted)
                return EXIT_INTERRUPTED
            except Exception as error:
                told = error if is_of_user(error) else explain(error, less_memory=less_memory)
                if told is None:
                    _report_to_torchrun(f"{type(error).__name__}: {error}", traceback.format_exc())
                    raise
                say_error(_message_of(told))
                return getattr(told, "exit_code", 1)

        return run

    return decorate


def _message_of(error: Exception) -> str:
    """Return an error's message; of an OSError that names a file without the number of the error."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def is_of_user(error: Exception) -> bool:
    """Return whether the user can fix an error.

    An OSError with an errno comes from the operating system and concerns the user's files, disk or network: no such
    file, no space, no permission. It may not name a file: a full disk fails in write(), which only has a descriptor. A
    closed descriptor is a bug of ours, and so is an OSError without an errno, which a library made up. A text that the
    terminal can't encode is for the user to fix, since we never encode to anything but UTF-8 ourselves.
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno != errno.EBADF
    if isinstance(error, UnicodeEncodeError):
        return error.encoding not in ("utf-8", "utf8")
    return isinstance(error, UserError)


def say(message: str) -> None:
    """Print a line to standard error, prefixed with the rank if there are several."""
    rank = os.environ.get("RANK")
    where = "" if rank is None else f"[rank {rank}] "
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{where}{message}\n")  # in one call, so that lines of several ranks do not mix
        sys.stderr.flush()


def say_error(message: str) -> None:
    """Print an error that the user can fix and report it to torchrun; do nothing if the message is empty."""
    if message:
        say(f"error: {message}")
        _report_to_torchrun(message, f"error: {message}")


def run_script(name: str) -> int:
    """Import and run a command by its name in COMMANDS, with the arguments of the process; return the exit code.

    Signal handlers are installed before the import, which can take half a minute and turns a KeyboardInterrupt into
    other errors. During the import, Ctrl-C ends the process at once with one line.
    """
    if name != "pretrain":
        _end_at_interrupt()
        return _import_and_run(name)
    # never left: a signal must not change the exit code of a run that has ended already
    return _import_and_run(name, signals=SignalCatcher().__enter__())


def _import_and_run(name: str, **options: Any) -> int:
    try:
        with needed_by(f"megatron-tf {name}"), _uncollected():
            module = importlib.import_module(f"megatron_tf.commands.{COMMANDS[name].module}")
    except UserError as error:
        say_error(str(error))
        return error.exit_code
    code: int = module.main(**options)
    gc.freeze()  # or the collection at exit looks at all that is left
    return code


def import_late(module: str) -> None:
    """Import a slow module after a command has parsed its options, so that errors in those are reported at once.

    During the import, Ctrl-C ends the process at once. Raises ImportError.
    """
    before = signal.getsignal(signal.SIGINT)
    _end_at_interrupt()
    try:
        with _uncollected():
            importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Import modules without collecting garbage, and exempt what they hold from later collections.

    Imports of torch leave no garbage to speak of, but they allocate so much that collections, which look at everything
    again and again, take a third of their time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _end_at_interrupt() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless a shell makes a job ignore it
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    say(INTERRUPTED)
    os._exit(EXIT_INTERRUPTED)


def _report_to_torchrun(message: str, callstack: str) -> None:
    """Write the error to the file that torchrun shows in its table of failures, as torch's `@record` does, but without
    importing torch: errors in the options are reported before that."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # torchrun shows the call stack in its table: for an error that the user can fix it is just the message
    extra = {"py_callstack": callstack, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
