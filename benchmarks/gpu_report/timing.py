"""Timing of work on the device, by call and by kernel, and capture as a CUDA graph."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import torch


def synchronize(device: torch.device) -> None:
    """Wait for all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    work: Callable[[], object], device: torch.device, *, turns: int, calls: int = 1, warm_up: int = 3
) -> float:
    """Return the median time of one call, measured as in `paired_milliseconds`."""
    return paired_milliseconds({"": work}, device, turns=turns, calls=calls, warm_up=warm_up)[""]


def paired_milliseconds(
    works: dict[str, Callable[[], object]], device: torch.device, *, turns: int, calls: int = 1, warm_up: int = 3
) -> dict[str, float]:
    """Return the median time of one call of each, measured alternately, so that clock changes affect all of them.

    Synchronizes after `calls` calls; with several, one is launched while another runs, as in training.
    """
    for work in works.values():
        for _ in range(warm_up):
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                work()
            synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def kernel_times(work: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Return (name, launches, milliseconds) of every kernel of one call, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return [(event.key, event.count, event.self_device_time_total / 1000) for event in events]


def is_capturable(work: Callable[[], object]) -> str:
    """Capture one call as a CUDA graph and replay it; returns the reason for a failure, or an empty string."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            work()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:
        with suppress(Exception):
            torch.cuda.synchronize()
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""
