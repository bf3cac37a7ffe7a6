"""torchrun that ends as its ranks do: `python -m megatron_tf.torchrun [options] -m megatron_tf.pretrain CONFIG.yaml`.

It takes the options of torchrun. After Ctrl-C or an error in a rank, torchrun itself prints a report of its own below
what the ranks said and ends with 1; here the ranks have the last word, and the exit code is that of the first to fail.
"""

import logging
import os
import sys
from signal import SIGTERM, Signals

from megatron_tf.commands.runner import command, import_late

FORWARDED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SECONDS_TO_SAVE = 600
"""How long ranks have to save after a signal, before torchrun kills them; torchrun's own default is 30."""


@command()
def main(arguments: list[str] | None = None) -> int:
    """The exit code: that of the rank that failed first, 128 + the number of a signal that ended it or this process, 0
    where all ranks are done."""
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", FORWARDED_SIGNALS)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    import_late("torch.distributed.run")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(arguments)
    _silence_reports(is_started_again=options.max_restarts > 0)
    try:
        run.run(options)
    except ChildFailedError as error:
        # torchrun ends the ranks that are left with SIGTERM
        failures = sorted(error.failures.items(), key=lambda item: (item[1].exitcode == -SIGTERM, item[1].timestamp))
        rank, failure = failures[0]
        if failure.exitcode < 0:  # a rank that ends by itself has said why
            name = Signals(-failure.exitcode).name
            print(f"error: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
        return shell_code(failure.exitcode)
    except SignalException as signal:
        return shell_code(-signal.sigval)
    return 0


def shell_code(code: int) -> int:
    """The exit code as shells count it, of one that is negative after a signal."""
    return 128 - code if code < 0 else code


def _silence_reports(*, is_started_again: bool) -> None:
    """Of torchrun's log lines, keep those on ranks that failed and are started again."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.ERROR if is_started_again else logging.CRITICAL)
