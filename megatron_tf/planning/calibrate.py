"""Measures this machine's CPU: the parts of a model by the trainer's code, the optimizer, and two ranks over gloo."""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import ProcessGroup

from megatron_tf.errors import UserError
from megatron_tf.layers.casting import keeping_casts
from megatron_tf.planning.counts import part_key
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.parts import PartName, keep_casts, runnable_part
from megatron_tf.planning.rates import Machine, PartSeconds, PassSeconds, sent_bytes
from megatron_tf.training.dry_run.collectives import Traffic

CPU = torch.device("cpu")
_NUMBERS = 1 << 22  # of the optimizer's measurement: 16 MB in fp32, more than a cache
_TIMEOUT = timedelta(minutes=3)  # two processes import torch, perhaps on a busy machine
_REPEATS = 3


@dataclass(frozen=True)
class Line:
    """Seconds as a linear function of bytes."""

    latency: float
    seconds_per_byte: float


class MeasuredMachine(Machine):
    """A rank that is a process on this machine's CPU, as fast as it is measured, each kind of part once."""

    overlaps = False  # gloo takes the same cores

    def __init__(self, network: Line | None) -> None:
        self.network = network
        """None if no two ranks exchange anything."""
        self._parts: dict[Any, PartSeconds] = {}
        self._per_number: float | None = None

    def part(self, planned: PlannedLayout, name: PartName, layer: int) -> PartSeconds:
        key = part_key(planned.config, name, layer)
        if key not in self._parts:
            self._parts[key] = _time_part(planned, name, layer)
        return self._parts[key]

    def update(self, planned: PlannedLayout, numbers: int) -> float:
        if self._per_number is None:
            self._per_number = _time_update() / _NUMBERS
        return numbers * self._per_number

    def collective(self, traffic: Traffic, *, size: int, stride: int) -> float:
        assert self.network is not None, "there is one rank"
        return traffic.calls * self.network.latency + sent_bytes(traffic, size) * self.network.seconds_per_byte


def _time_part(planned: PlannedLayout, name: PartName, layer: int) -> PartSeconds:
    with runnable_part(planned.config, name, layer, device=CPU) as part, keeping_casts(part.state.model):
        keep_casts(part.state)
        forward, backward = [], []
        for _ in range(_REPEATS + 1):
            start = time.perf_counter()
            out = part.forward()
            middle = time.perf_counter()
            out.backward(torch.ones_like(out))
            forward.append(middle - start)
            backward.append(time.perf_counter() - middle)
    # the first run allocates
    return PartSeconds(*(PassSeconds(statistics.median(times[1:])) for times in (forward, backward)))


def _time_update() -> float:
    """Time what an optimizer step does to each number: the norm of the gradients, clipping, AdamW."""
    parameter = torch.zeros(_NUMBERS, requires_grad=True)
    gradient = parameter.grad = torch.ones(_NUMBERS)
    adam = torch.optim.AdamW([parameter], fused=True)

    def step() -> None:
        norm = float(torch.linalg.vector_norm(gradient))
        torch._foreach_mul_([gradient], 1 / norm)
        adam.step()

    return _median_time(step)


def _median_time(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure_network() -> Line:
    """Time all-reduces between two processes over gloo. Raises UserError if they do not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(_exchange, args=(folder,), nprocs=2, join=False)
        deadline = time.monotonic() + _TIMEOUT.total_seconds()
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                raise UserError("two processes could not exchange messages over gloo within 3 minutes")
        return Line(*json.loads(_result(folder).read_text()))


def _result(folder: str) -> Path:
    return Path(folder) / "seconds.json"


def _exchange(rank: int, folder: str) -> None:
    """Take part in the measurement; the first rank writes the result."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=_TIMEOUT)
    line = time_messages(dist.group.WORLD)
    if rank == 0:
        _result(folder).write_text(json.dumps(dataclasses.astuple(line)))
    dist.destroy_process_group()


def time_messages(group: ProcessGroup | None) -> Line:
    """Time all-reduces between the two ranks of a group. Collective."""
    small, large = torch.zeros(1), torch.zeros(_NUMBERS)
    latency = statistics.median(_median_time(lambda: dist.all_reduce(small, group=group)) for _ in range(20))
    # between two ranks, each sends as many bytes as there are: half of them twice
    seconds = _median_time(lambda: dist.all_reduce(large, group=group)) - latency
    return Line(latency, max(seconds, 0.0) / large.nbytes)
