"""Measures this machine's CPU: the parts of a model by the trainer's code, and the optimizer."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch

from megatron_tf.config import RunConfig
from megatron_tf.layers.casting import keeping_casts
from megatron_tf.planning.counts import part_key
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.neighbor import Neighbor, Run, Work
from megatron_tf.planning.network import Network
from megatron_tf.planning.parts import PartName, keep_casts, runnable_part
from megatron_tf.planning.rates import Machine, PartSeconds, PassSeconds
from megatron_tf.training.dry_run.collectives import Traffic

CPU = torch.device("cpu")
_NUMBERS = 1 << 22  # of the optimizer's measurement: 16 MB in fp32, more than a core's own caches
_REPEATS = 3


class MeasuredMachine(Machine):
    """A rank that is a process on this machine's CPU, as fast as it is measured, each kind of part once.

    Of two ranks, each is measured while another process computes the same.
    """

    overlaps = False  # gloo takes the same cores

    def __init__(self, network: Network | None) -> None:
        self.network = network
        """None if there is one rank."""
        self._parts: dict[Any, PartSeconds] = {}

    @cached_property
    def _neighbor(self) -> Neighbor | None:
        return None if self.network is None else Neighbor()

    def part(self, planned: PlannedLayout, name: PartName, layer: int) -> PartSeconds:
        key = part_key(planned.config, name, layer)
        if key not in self._parts:
            passes = self._time(partial(_part, planned.config, name, layer))
            self._parts[key] = PartSeconds(*map(PassSeconds, passes))
        return self._parts[key]

    def update(self, planned: PlannedLayout, numbers: int) -> float:
        return numbers * self._seconds_per_number

    @cached_property
    def _seconds_per_number(self) -> float:
        (seconds,) = self._time(_update)
        return seconds / _NUMBERS

    def collective(self, traffic: Traffic, *, size: int, stride: int) -> float:
        assert self.network is not None, "there is one rank"
        return self.network.time(traffic)

    def _time(self, work: Work) -> list[float]:
        """Return the median seconds of each pass of a computation."""
        with self._neighbor.computing(work) if self._neighbor else nullcontext(), work() as run:
            times = [run() for _ in range(_REPEATS + 1)][1:]  # the first run allocates
        return [statistics.median(passes) for passes in zip(*times, strict=True)]


@contextmanager
def _part(config: RunConfig, name: PartName, layer: int) -> Iterator[Run]:
    """Build a part of the model; its passes are forward and backward."""
    with runnable_part(config, name, layer, device=CPU) as part, keeping_casts(part.state.model):
        keep_casts(part.state)

        def run() -> tuple[float, float]:
            _evict_caches()
            start = time.perf_counter()
            out = part.forward()
            forward = time.perf_counter() - start
            _evict_caches()
            start = time.perf_counter()
            out.backward(torch.ones_like(out))
            return forward, time.perf_counter() - start

        yield run


def _evict_caches() -> None:
    """Use other memory, as the rest of a step does between two passes of a part."""
    torch.ones(_NUMBERS).mul_(2)


@contextmanager
def _update() -> Iterator[Run]:
    """Prepare what an optimizer step does to each of _NUMBERS numbers: the gradients' norm, clipping, AdamW."""
    parameter = torch.zeros(_NUMBERS, requires_grad=True)
    gradient = parameter.grad = torch.ones(_NUMBERS)
    adam = torch.optim.AdamW([parameter], fused=True)

    def run() -> tuple[float]:
        start = time.perf_counter()
        norm = float(torch.linalg.vector_norm(gradient))
        torch._foreach_mul_([gradient], 1 / norm)
        adam.step()
        return (time.perf_counter() - start,)

    yield run
