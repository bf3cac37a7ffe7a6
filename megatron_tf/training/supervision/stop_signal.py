"""Stopping a run at the next step, on a signal or when its time is up, on all ranks together."""

import time

import torch
import torch.distributed as dist

from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.supervision.signals import SignalCatcher, name_of


class Stopping:
    """What was requested of any rank: a stop, by one of the signals or by a limit of time; a trace of the next step.

    `since` is when the run began, by time.monotonic.
    """

    def __init__(self, mesh: Mesh, signals: SignalCatcher, limit_minutes: float | None, since: float) -> None:
        self.mesh, self.signals = mesh, signals
        self.deadline = None if limit_minutes is None else since + 60 * limit_minutes
        self.is_trace_asked = False
        self.number = 0
        """The signal that stops the run, once `agreed` has said so; 0 for none."""
        self.reason = ""
        """Why the run stops, once `agreed` has said so."""

    def agreed(self, *, by_time: bool = True) -> bool:
        """Whether any rank was asked to stop, `by_time` too; the same answer on every rank, which all call it together.

        A trace that one was asked for is then asked of all.
        """
        is_late = by_time and self.deadline is not None and time.monotonic() > self.deadline
        requests = [self.signals.number, int(is_late), int(self.signals.is_trace_requested)]
        self.signals.is_trace_requested = False
        asked = torch.tensor(requests, device=self.mesh.device)
        if self.mesh.world is not None:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.mesh.world)
        number, late, trace = asked.tolist()
        self.is_trace_asked = self.is_trace_asked or bool(trace)
        if number:
            self.number, self.reason = number, name_of(number)
        elif late:
            self.reason = "its time is up (training.exit_duration_in_mins)"
        return bool(self.reason)

    def take_trace_asked(self) -> bool:
        """Whether a trace was asked for, by the last `agreed`; the question is then answered."""
        asked, self.is_trace_asked = self.is_trace_asked, False
        return asked
