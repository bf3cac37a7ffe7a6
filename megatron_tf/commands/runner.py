"""Runs a command: prints its errors, sets its exit code, handles Ctrl-C, and reports to torchrun.

One policy for all commands. What a user can fix ends in one line `error: ...` without a traceback and the exit code of
the error, 1 by default; Ctrl-C in one line and 130; whatever else is raised is a bug of ours and keeps its traceback.
Imports nothing that takes time.
"""

import contextlib
import errno
import functools
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from megatron_tf.commands.registry import COMMANDS
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by
from megatron_tf.training.supervision.signals import catch_from_first_line

EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells count it
INTERRUPTED = "interrupted: start the same command again"

Main = Callable[..., int]
"""Takes the arguments, by default those of the process, and options of its own; returns the exit code."""


def command(*, interrupted: str = INTERRUPTED) -> Callable[[Main], Main]:
    """Make a function the `main` of a command: it then returns an exit code for what a user did, whatever that was.

    `interrupted` is the line after Ctrl-C. What the command left unfinished, it removes or keeps itself.
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
                if not is_of_user(error):
                    _report_to_torchrun(f"{type(error).__name__}: {error}", traceback.format_exc())
                    raise
                say_error(str(error))
                return getattr(error, "exit_code", 1)

        return run

    return decorate


def is_of_user(error: Exception) -> bool:
    """Whether a user can fix it.

    An OSError with an errno is what the operating system said of the user's files, disk or network: no such file, no
    space, no permission. It need not name a file: a full disk fails in write(), which only has a descriptor. A closed
    descriptor is a bug of ours, and so is an OSError that a library made up, without an errno. A terminal that can't
    show a text is the user's too: we ourselves encode nothing but UTF-8.
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno != errno.EBADF
    if isinstance(error, UnicodeEncodeError):
        return error.encoding not in ("utf-8", "utf8")
    return isinstance(error, UserError)


def say(message: str) -> None:
    """Print a line to standard error, named by this rank if there are several."""
    rank = os.environ.get("RANK")
    where = "" if rank is None else f"[rank {rank}] "
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{where}{message}\n")  # in one call: lines of several ranks must not mix
        sys.stderr.flush()


def say_error(message: str) -> None:
    """Print what a user can fix, and let torchrun know; nothing where the message is empty."""
    if message:
        say(f"error: {message}")
        _report_to_torchrun(message, f"error: {message}")


def run_script(name: str) -> int:
    """Import and run a command by its name in COMMANDS, with the arguments of the process; the exit code.

    Signals are caught before the import, which can take half a minute and answers a KeyboardInterrupt with errors of
    its own: Ctrl-C ends the process at once meanwhile, in one line.
    """
    if name == "pretrain":
        catch_from_first_line()
    else:
        _end_at_interrupt()
    try:
        with needed_by(f"megatron-tf {name}"):
            module = importlib.import_module(f"megatron_tf.commands.{COMMANDS[name].module}")
    except UserError as error:
        say_error(str(error))
        return error.exit_code
    code: int = module.main()
    return code


def import_late(module: str) -> None:
    """Import what takes seconds, for a command that does so late: after it has read its options, so that a mistake in
    them is answered at once. Ctrl-C ends the process at once meanwhile. Raises ImportError."""
    before = signal.getsignal(signal.SIGINT)
    _end_at_interrupt()
    try:
        importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)


def _end_at_interrupt() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell lets a job ignore it
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    say(INTERRUPTED)
    os._exit(EXIT_INTERRUPTED)


def _report_to_torchrun(message: str, callstack: str) -> None:
    """Write the error to the file that torchrun reads into its table of failures, as torch's `@record` does. torch is
    not imported for it: an error in the options is answered before that."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # torchrun shows the call stack in its table: of what a user can fix, that is the message alone
    extra = {"py_callstack": callstack, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
