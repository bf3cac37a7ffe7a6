"""Stop all ranks of a run at the same step: on a signal, at the time limit, or when an observer requests it."""

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
    """The signal that one of them received; 0 for none."""
    is_final: bool = False
    """Whether launchers should not restart the run."""


class StopSignal:
    """Lets the ranks agree whether to stop. The time limit starts when it is created."""

    def __init__(self, mesh: Mesh, signals: SignalCatcher, limit_minutes: float | None) -> None:
        self.mesh = mesh
        self.signals = signals
        self.deadline = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes

    def agree(self, reason: str | None = None, *, by_time: bool = True) -> tuple[Stop | None, bool]:
        """Return why all ranks stop, if they do, and whether any received SIGUSR2 since the last call. Collective.

        `reason` is why this rank's observers want to stop, None if they do not. The time limit applies if `by_time`.
        """
        is_late = by_time and self.deadline is not None and time.monotonic() > self.deadline
        mine = [self.signals.number, is_late, self.signals.take_trace_request(), reason is not None]
        # on the host, where the world communicates too: nothing here waits for the device
        requested = torch.tensor([int(request) for request in mine])
        number, late, trace, observed = all_reduce(requested, self.mesh.world, dist.ReduceOp.MAX).tolist()
        stop = None
        if observed:  # takes precedence over a signal, after which a launcher would restart the run
            stop = Stop(self.mesh.first_failure(reason) or "", is_final=True)
        elif number:
            stop = Stop(name_of(number), number)
        elif late:
            stop = Stop("its time limit (training.exit_duration_in_mins)")
        return stop, bool(trace)
