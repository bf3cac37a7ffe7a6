"""Stragglers: ranks whose own work takes longer than the same work on other ranks, so that all ranks wait for them.

The time of a step is the same on every rank, since the ranks wait for each other: the slow rank is the one that waits
least. What is compared is therefore the time that a rank works, which is

    data                of all steps: reading does not wait for other ranks
    computation         of profiled steps: forward, backward and update, less the time that a collective was running
    report              of all steps: logs, metrics and observers

Only ranks of one pipeline stage are compared with each other, as stages differ in their work.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.parallel.collectives import all_gather_copy
from megatron_tf.parallel.mesh import AXES, Mesh

PHASES = ("data", "computation", "report")


@dataclass(frozen=True, kw_only=True)
class SlowestRank:
    """The rank that works longest, compared with the median of the other ranks of its pipeline stage."""

    rank: int
    slowdown: float
    """Its work over that of the median rank."""
    phase: str
    """The phase in which it exceeds the median most."""
    seconds: float
    """Seconds of that phase in a step."""
    median_seconds: float
    """The same on the median rank."""


class StragglerDetector:
    """Compares the work of all ranks at each log interval. Every rank has one, and all call it at the same points.

    Before the first profiled step there is no result, and never if there is no rank to compare with.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.num_stages = mesh.size("pp")
        self.is_enabled = mesh.size("tp") * mesh.size("dp_cp") > 1
        self._computations: list[float] = []
        self._computation: float | None = None
        self.has_new_profile = False
        """Whether the last result is of steps profiled since the one before."""
        self._hosts: Sequence[str] = ()

    def on_profile(self, seconds: float, communication: float) -> None:
        """Record a profiled step: how long it took from forward to update, and how long a collective was running."""
        self._computations.append(max(seconds - communication, 0.0))

    def reset(self) -> None:
        """Discard the recorded steps, whose model was another one."""
        self._computations, self._computation = [], None

    def find_slowest(self, work: Mapping[str, float], num_steps: int) -> SlowestRank | None:
        """Return the slowest rank since the last call, the same on every rank. Collective.

        `work` has the seconds of data and report over `num_steps` steps, without waiting for other ranks. The
        computation is the mean of the profiled steps since the last call, or that of earlier ones if there are none.
        """
        self.has_new_profile = bool(self._computations)
        if self._computations:
            self._computation = sum(self._computations) / len(self._computations)
            self._computations = []
        if self._computation is None or not self.is_enabled:
            return None
        mine = [work.get("data", 0.0) / num_steps, self._computation, work.get("report", 0.0) / num_steps]
        # on the host, as the stop signal: nothing here waits for the device
        everyone = torch.tensor([mine], dtype=torch.float64)
        for axis in reversed(AXES):  # in rank order, as tensor-parallel ranks are adjacent
            everyone = all_gather_copy(everyone, 0, self.mesh.group(axis))
        return slowest_rank(everyone.unflatten(0, (self.num_stages, -1)))

    def host_of(self, rank: int) -> str:
        """Return the host of a rank. Collective on the first call."""
        self._hosts = self._hosts or self.mesh.gather(socket.gethostname())
        return self._hosts[rank]


def slowest_rank(seconds: Tensor) -> SlowestRank:
    """Return the slowest rank, relative to its stage.

    `seconds` is what each rank works in each phase of a step: [stages, ranks per stage (at least 2), PHASES].
    """
    per_stage = seconds.shape[1]
    return max(
        (_slowest_of_stage(stage, index * per_stage) for index, stage in enumerate(seconds)),
        key=lambda slowest: slowest.slowdown,
    )


def _slowest_of_stage(seconds: Tensor, first_rank: int) -> SlowestRank:
    """Return the slowest of the ranks from `first_rank` on: [ranks, PHASES]."""
    index = int(seconds.sum(1).argmax())
    # without the rank itself, which would hide how slow it is among a few ranks
    others = torch.cat((seconds[:index], seconds[index + 1 :]))
    median = others.median(0).values
    phase = int((seconds[index] - median).argmax())
    return SlowestRank(
        rank=first_rank + index,
        slowdown=float(seconds[index].sum() / others.sum(1).median().clamp(min=1e-9)),
        phase=PHASES[phase],
        seconds=float(seconds[index, phase]),
        median_seconds=float(median[phase]),
    )
