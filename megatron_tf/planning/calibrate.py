"""Measures this machine's CPU: the parts of a model by the trainer's code, and the optimizer."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_tf.layers.casting import keeping_casts
from megatron_tf.planning.counts import part_key
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.network import Network
from megatron_tf.planning.parts import PartName, keep_casts, runnable_part
from megatron_tf.planning.rates import Machine, PartSeconds, PassSeconds
from megatron_tf.training.dry_run.collectives import Traffic

CPU = torch.device("cpu")
_NUMBERS = 1 << 22  # of the optimizer's measurement: 16 MB in fp32, more than a cache
_REPEATS = 3


class MeasuredMachine(Machine):
    """A rank that is a process on this machine's CPU, as fast as it is measured, each kind of part once."""

    overlaps = False  # gloo takes the same cores

    def __init__(self, network: Network | None) -> None:
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
        return self.network.time(traffic)


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
