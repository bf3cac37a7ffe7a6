"""Looking into single steps: how long ranks communicate, and traces on demand."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_tf.config import LoggingConfig
from megatron_tf.parallel.mesh import Mesh

_COMMUNICATION = ("gloo:", "ncclDevKernel", "ncclKernel")  # how the backends' own events are called


class Profiler:
    """Profiles the steps that the configuration names, the next one when asked to, and every
    `communication_interval`-th one of a run of several ranks for the time it communicates."""

    def __init__(self, config: LoggingConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.is_asked = False
        """Whether the next step is to be traced."""
        self.communication: float | None = None
        """Seconds in which collectives were under way in the last step, where it was looked at."""
        self.written: Path | None = None
        """This rank's trace of the last step, if it was traced."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints lines of its own

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the step that makes `step` of them."""
        first, last = self.config.profile_step_start, self.config.profile_step_end
        is_traced = self.config.profile_dir is not None and (
            self.is_asked or (first is not None and last is not None and first <= step <= last)
        )
        interval = self.config.communication_interval
        is_sampled = bool(self.mesh.world and interval and step % interval == 0)
        self.communication = self.written = None
        self.is_asked = False
        if not (is_traced or is_sampled):
            yield
            return
        on_gpu = self.mesh.device.type == "cuda"
        kinds = {ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU}  # only a trace needs both
        with profile(activities=kinds | {ProfilerActivity.CPU} if is_traced else kinds) as profiled:
            yield
        self.communication = _seconds_of_communication(profiled)
        if is_traced:
            assert self.config.profile_dir is not None
            place = "-".join(f"{axis}{self.mesh.rank(axis):02d}" for axis in ("pp", "tp", "dp"))
            self.config.profile_dir.mkdir(parents=True, exist_ok=True)
            self.written = self.config.profile_dir / f"step-{step:08d}-{place}.json.gz"
            profiled.export_chrome_trace(str(self.written))


def _seconds_of_communication(profiled: profile) -> float:
    """Time in which at least one collective was under way."""
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    return (
        length_of_union(
            [
                (event.start_ns(), event.start_ns() + event.duration_ns())
                for event in results.events()
                if event.name().startswith(_COMMUNICATION)
            ]
        )
        / 1e9
    )


def length_of_union(intervals: Sequence[tuple[int, int]]) -> int:
    """Of intervals that may overlap."""
    total, end = 0, 0
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
