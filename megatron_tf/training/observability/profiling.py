"""Profiles of single steps: the time of communication, and traces on request."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_tf.config import LoggingConfig
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.observability.observer import Observer

_COMMUNICATION = ("gloo:", "ncclDevKernel", "ncclKernel")  # prefixes of the backends' own events


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """A profiled step on this rank."""

    step: int
    seconds: float
    """From forward to update, without the profiler's own start and end."""
    communication: float
    """Seconds during which at least one collective was running, waiting for other ranks included."""
    trace: Path | None
    """The file of the trace, if one was requested."""


Report = Callable[[StepProfile], None]


class Profiler(Observer):
    """Profiles steps and calls `report` at the end of each.

    It traces the configured steps, and the next step when a trace is requested. In a run of several ranks, it also
    measures the communication time of every `communication_interval`-th step.
    """

    def __init__(self, config: LoggingConfig, mesh: Mesh, report: Report) -> None:
        self.config = config
        self.mesh = mesh
        self.report = report
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise kineto prints lines for each profile

    @contextmanager
    def during_step(self, step: int, *, is_trace_requested: bool) -> Iterator[None]:
        is_traced = self.config.profile_dir is not None and (is_trace_requested or self._is_chosen(step))
        interval = self.config.communication_interval
        is_sampled = bool(self.mesh.world and interval and step % interval == 0)
        if not (is_traced or is_sampled):
            yield
            return
        activities = {ProfilerActivity.CUDA if self.mesh.device.type == "cuda" else ProfilerActivity.CPU}
        if is_traced:
            activities.add(ProfilerActivity.CPU)  # for the communication time, GPU events suffice
        with profile(activities=activities) as profiled:
            start = time.perf_counter()
            yield
            seconds = time.perf_counter() - start
        trace = self._write_trace(profiled, step) if is_traced else None
        communication = _seconds_of_communication(profiled)
        self.report(StepProfile(step=step, seconds=seconds, communication=communication, trace=trace))

    def _is_chosen(self, step: int) -> bool:
        first = self.config.profile_step_start
        last = self.config.profile_step_end
        return first is not None and last is not None and first <= step <= last

    def _write_trace(self, profiled: profile, step: int) -> Path:
        assert self.config.profile_dir is not None
        mesh = self.mesh
        place = f"pp{mesh.rank('pp'):02d}-tp{mesh.rank('tp'):02d}-dp{mesh.rank('dp_cp'):02d}"
        self.config.profile_dir.mkdir(parents=True, exist_ok=True)
        path = self.config.profile_dir / f"step-{step:08d}-{place}.json.gz"
        profiled.export_chrome_trace(str(path))
        return path


def _seconds_of_communication(profiled: profile) -> float:
    """Return the time during which at least one collective was running."""
    assert profiled.profiler is not None
    # private: the public events() first converts every operation to a Python object in a tree
    results = profiled.profiler.kineto_results
    assert results is not None
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.name().startswith(_COMMUNICATION)
    ]
    return length_of_union(spans) / 1e9


def length_of_union(intervals: Sequence[tuple[int, int]]) -> int:
    """Return the total length covered by intervals that may overlap."""
    total = 0
    end = 0
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
