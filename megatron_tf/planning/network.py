"""Times messages between two processes on this machine over gloo, by kind and size.

A line through two points does not do: over gloo an all-reduce of 1 MB takes several times as long as its share of one
of 16 MB.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.errors import UserError
from megatron_tf.parallel.collectives import all_gather_copy, all_to_all_copy, reduce_scatter_copy
from megatron_tf.training.dry_run.collectives import Traffic

_TIMEOUT = timedelta(minutes=3)  # two processes import torch, perhaps on a busy machine
_SIZES = tuple(1 << power for power in (3, 12, 16, 18, 20, 22, 24))
"""Bytes of the larger side of a message that is timed."""
_REPEATS = 15
_PRODUCT = 512
"""Rows and columns of a product before each message: ranks that compute a few milliseconds in between wait longer."""


@dataclass(frozen=True)
class Network:
    """How long messages between two ranks take."""

    seconds: Mapping[str, Sequence[float]]
    """Kind of message -> seconds at each size that is timed."""

    def time(self, traffic: Traffic) -> float:
        """Return the seconds of messages of one kind and size, one after the other."""
        size, seconds = traffic.bytes / traffic.calls, self.seconds[traffic.kind]
        if size <= _SIZES[-1]:
            return traffic.calls * float(np.interp(size, _SIZES, seconds))
        rate = max(0.0, seconds[-1] - seconds[-2]) / (_SIZES[-1] - _SIZES[-2])
        return traffic.calls * (seconds[-1] + (size - _SIZES[-1]) * rate)


def measure_network() -> Network:
    """Start two processes that time their messages. Raises UserError if they do not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(_exchange, args=(folder,), nprocs=2, join=False)
        deadline = time.monotonic() + _TIMEOUT.total_seconds()
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                raise UserError("two processes could not exchange messages over gloo within 3 minutes")
        return Network(**json.loads(_result(folder).read_text()))


def _result(folder: str) -> Path:
    return Path(folder) / "network.json"


def _exchange(rank: int, folder: str) -> None:
    """Take part in the measurement; the first rank writes the result."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=_TIMEOUT)
    assert dist.group.WORLD is not None
    network = time_messages(dist.group.WORLD)
    if rank == 0:
        _result(folder).write_text(json.dumps(asdict(network)))
    dist.destroy_process_group()


def time_messages(group: ProcessGroup) -> Network:
    """Time messages between the two ranks of a group. Collective."""
    times: dict[str, list[float]] = {}
    for size in _SIZES:
        for kind, exchange in _exchanges(group, torch.zeros(size // 4)).items():
            times.setdefault(kind, []).append(_median_seconds(exchange))
    # a message there, and one back
    return Network(times | {"send": [seconds / 2 for seconds in times["send"]]})


def _exchanges(group: ProcessGroup, message: Tensor) -> Mapping[str, Callable[[], Any]]:
    half = message.chunk(2)[0]
    return {
        "all-reduce": lambda: dist.all_reduce(message, group=group),
        "all-gather": lambda: all_gather_copy(half, 0, group),
        "reduce-scatter": lambda: reduce_scatter_copy(message, 0, group),
        "all-to-all": lambda: all_to_all_copy(message, group, split_dim=0, concat_dim=0),
        "send": lambda: _there_and_back(message, group),
    }


def _there_and_back(message: Tensor, group: ProcessGroup) -> None:
    other = 1 - group.rank()
    if other == 1:
        dist.send(message, group=group, group_dst=other)
        dist.recv(message, group=group, group_src=other)
    else:
        dist.recv(message, group=group, group_src=other)
        dist.send(message, group=group, group_dst=other)


def _median_seconds(exchange: Callable[[], Any]) -> float:
    square, times = torch.zeros(_PRODUCT, _PRODUCT), []
    for _ in range(_REPEATS + 2):
        square @ square
        start = time.perf_counter()
        exchange()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])  # the first ones connect and allocate
