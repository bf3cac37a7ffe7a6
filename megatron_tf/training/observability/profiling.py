"""Looking into single steps: how long ranks communicate, and traces on demand."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_tf.config import LoggingConfig
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.observability.observer import Observer

_COMMUNICATION = ("gloo:", "ncclDevKernel", "ncclKernel")  # how the backends' own events are called


Report = Callable[[int, float, Path | None], None]
"""Takes a step that was profiled, the seconds in which collectives were under way in it, and this rank's trace, if
there is one."""


class Profiler(Observer):
    """Profiles steps, and gives `report` what it saw in each, at its end.

    These are the steps that the configuration names, the next one when a trace is requested, and in a run of several
    ranks every `communication_interval`-th one for the time it communicates.
    """

    def __init__(self, config: LoggingConfig, mesh: Mesh, report: Report) -> None:
        self.config = config
        self.mesh = mesh
        self.report = report
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints lines of its own

    @contextmanager
    def during_step(self, step: int, *, is_trace_requested: bool) -> Iterator[None]:
        """See Observer."""
        is_traced = self.config.profile_dir is not None and (is_trace_requested or self._is_chosen(step))
        interval = self.config.communication_interval
        is_sampled = bool(self.mesh.world and interval and step % interval == 0)
        if not (is_traced or is_sampled):
            yield
            return
        activities = {ProfilerActivity.CUDA if self.mesh.device.type == "cuda" else ProfilerActivity.CPU}
        if is_traced:
            activities.add(ProfilerActivity.CPU)  # the events of the GPU alone tell the time of communication
        with profile(activities=activities) as profiled:
            yield
        trace = self._write_trace(profiled, step) if is_traced else None
        self.report(step, _seconds_of_communication(profiled), trace)

    def _is_chosen(self, step: int) -> bool:
        first = self.config.profile_step_start
        last = self.config.profile_step_end
        return first is not None and last is not None and first <= step <= last

    def _write_trace(self, profiled: profile, step: int) -> Path:
        assert self.config.profile_dir is not None
        place = "-".join(f"{axis}{self.mesh.rank(axis):02d}" for axis in ("pp", "tp", "dp"))
        self.config.profile_dir.mkdir(parents=True, exist_ok=True)
        path = self.config.profile_dir / f"step-{step:08d}-{place}.json.gz"
        profiled.export_chrome_trace(str(path))
        return path


def _seconds_of_communication(profiled: profile) -> float:
    """Time in which at least one collective was under way."""
    assert profiled.profiler is not None
    # private: the public events() first makes Python objects of every operation, and links them into a tree
    results = profiled.profiler.kineto_results
    assert results is not None
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.name().startswith(_COMMUNICATION)
    ]
    return length_of_union(spans) / 1e9


def length_of_union(intervals: Sequence[tuple[int, int]]) -> int:
    """Measure what intervals cover that may overlap."""
    total = 0
    end = 0
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
