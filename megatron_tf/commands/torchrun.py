"""torchrun with clean exits: `python -m megatron_tf.torchrun [options] -m megatron_tf.pretrain CONFIG.yaml`.

Takes the options of torchrun. After Ctrl-C or an error in a rank, torchrun prints its own report below the messages of
the ranks and exits with 1. This command omits the report and exits with the code of the first rank that failed.
"""

import logging
import os
import sys
from signal import SIGTERM, SIGUSR2, Signals, signal

from megatron_tf.commands.runner import command, import_late, say

FORWARDED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SECONDS_TO_SAVE = 600
"""Time that ranks have to save after a signal before torchrun kills them; torchrun's default is 30."""


@command()
def main(arguments: list[str] | None = None) -> int:
    """Run torchrun. Returns 0 if all ranks succeed, the exit code of the rank that failed first, or 128 + the number of
    the signal that ended it or this process."""
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", FORWARDED_SIGNALS)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    import_late("torch.distributed.run")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # it would end the launcher, and the ranks would train on without it
    signal(SIGUSR2, lambda *_: say("SIGUSR2 requests a trace if it is sent to a rank, not to the launcher"))
    options = run.parse_args(arguments)
    _silence_reports(is_started_again=options.max_restarts > 0)
    try:
        run.run(options)
    except ChildFailedError as error:
        # torchrun ends the remaining ranks with SIGTERM
        failures = sorted(error.failures.items(), key=lambda item: (item[1].exitcode == -SIGTERM, item[1].timestamp))
        rank, failure = failures[0]
        if failure.exitcode < 0:  # a rank that exits by itself has printed the reason
            name = Signals(-failure.exitcode).name
            print(f"error: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
        return shell_code(failure.exitcode)
    except SignalException as received:
        return shell_code(-received.sigval)
    return 0


def shell_code(code: int) -> int:
    """Convert an exit code, negative after a signal, to that of a shell (128 + the signal's number)."""
    return 128 - code if code < 0 else code


def _silence_reports(*, is_started_again: bool) -> None:
    """Silence torchrun's log, except for errors of ranks that are restarted."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.ERROR if is_started_again else logging.CRITICAL)
