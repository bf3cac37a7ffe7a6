"""A second process that computes while this one is timed, as the other rank of a run does.

Two ranks on one machine share its memory and its caches, and perhaps the units of one core, so that each is slower than
alone.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp

from megatron_tf.errors import UserError

Run = Callable[[], Sequence[float]]
"""Computes something once, and returns the seconds that each of its passes took."""
Work = Callable[[], AbstractContextManager[Run]]
"""Prepares a computation. It is sent to the other process by pickle."""
_TIMEOUT_SECONDS = 180.0  # the other process imports torch, perhaps on a busy machine


class Neighbor:
    """A process that computes on request. It ends with this one."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        context.Process(target=_serve, args=(other_end, torch.get_num_threads()), daemon=True).start()
        other_end.close()

    @contextlib.contextmanager
    def computing(self, work: Work) -> Iterator[None]:
        """Let the other process compute `work`, again and again, until the end of the context.

        Raises UserError if it does not start to, or ends.
        """
        with _end_explained():
            self._pipe.send(work)
            if not self._pipe.poll(_TIMEOUT_SECONDS):
                raise UserError("a process that computes at the same time did not start within 3 minutes")
            self._pipe.recv()
        try:
            yield
        finally:
            with _end_explained():
                self._pipe.send(None)


@contextlib.contextmanager
def _end_explained() -> Iterator[None]:
    """Raise UserError if the other process has ended."""
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise UserError("a process that computes at the same time has ended: is there memory for two?") from None


def _serve(pipe: Connection, threads: int) -> None:
    """Compute what arrives, until something else does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the process that asks
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            work: Work = pipe.recv()
            with work() as run:
                run()
                pipe.send(None)
                while not pipe.poll():
                    run()
            pipe.recv()
