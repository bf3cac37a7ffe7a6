"""Stopping all ranks of a run at one step: on a signal, when its time is up, or when an observer requests it."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.supervision.signals import SignalCatcher, name_of


@dataclass(frozen=True)
class Stop:
    """Why the ranks stop."""

    reason: str
    number: int = 0
    """The signal that was sent to one of them; 0 for none."""
    is_final: bool = False
    """Whether the run is not to be started again on its own account."""


class StopSignal:
    """Finds out together whether to stop. The limit of time counts from when it is made."""

    def __init__(self, mesh: Mesh, signals: SignalCatcher, limit_minutes: float | None) -> None:
        self.mesh = mesh
        self.signals = signals
        self.deadline = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes

    def agree(self, reason: str | None = None, *, by_time: bool = True) -> tuple[Stop | None, bool]:
        """(whether and why all ranks stop, whether any was sent SIGUSR2 since the last call): the same on every rank,
        which all call it together.

        `reason` is why this rank's observers want to stop, None if they do not. Time that is up counts `by_time` only.
        """
        is_late = by_time and self.deadline is not None and time.monotonic() > self.deadline
        mine = [self.signals.number, is_late, self.signals.take_trace_request(), reason is not None]
        requested = torch.tensor([int(request) for request in mine], device=self.mesh.device)
        number, late, trace, observed = all_reduce(requested, self.mesh.world, dist.ReduceOp.MAX).tolist()
        stop = None
        if observed:  # it comes before a signal: what is to be started again would lose the reason
            stop = Stop(self.mesh.first_failure(reason) or "", is_final=True)
        elif number:
            stop = Stop(name_of(number), number)
        elif late:
            stop = Stop("its time is up (training.exit_duration_in_mins)")
        return stop, bool(trace)
