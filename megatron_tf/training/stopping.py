"""Stopping a run at the next step, on a signal or when its time is up, on all ranks together."""

import signal
import time
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from megatron_tf.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TRACE_SIGNAL = signal.SIGUSR2


class Stopping:
    """While it is entered, SIGTERM and SIGUSR1 ask for a stop instead of ending the process, as does a limit of time;
    SIGUSR2 asks for a trace of the next step.

    `since` is when the run began, by time.monotonic.
    """

    def __init__(self, mesh: Mesh, limit_minutes: float | None, since: float) -> None:
        self.mesh = mesh
        self.deadline = None if limit_minutes is None else since + 60 * limit_minutes
        self.signal = 0
        self.is_trace_asked = False
        self.reason = ""
        """Why the run stops, once `agreed` has said so."""

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank, which all call it together. A trace that
        one was asked for is then asked of all."""
        is_late = self.deadline is not None and time.monotonic() > self.deadline
        asked = torch.tensor([self.signal, int(is_late), int(self.is_trace_asked)], device=self.mesh.device)
        if self.mesh.world is not None:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.mesh.world)
        number, late, trace = asked.tolist()
        self.is_trace_asked = bool(trace)
        if number:
            self.reason = signal.Signals(number).name
        elif late:
            self.reason = "its time is up (training.exit_duration_in_mins)"
        return bool(self.reason)

    def take_trace_asked(self) -> bool:
        """Whether a trace was asked for, by the last `agreed`; the question is then answered."""
        asked, self.is_trace_asked = self.is_trace_asked, False
        return asked

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in (*SIGNALS, TRACE_SIGNAL)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == TRACE_SIGNAL:
            self.is_trace_asked = True
        else:
            self.signal = number
