"""How long a rank computes, and how long ranks exchange messages."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from megatron_tf.planning.cluster import Cluster
from megatron_tf.planning.counts import PartCounter, Pass
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.parts import PartName
from megatron_tf.training.dry_run.collectives import Traffic

_UPDATE_BYTES = 40
"""What an update reads and writes for each parameter: 12 for the norm and clipping of gradients, 28 for AdamW."""


class PassSeconds(NamedTuple):
    """Time that a rank computes for one micro-batch in one pass of a part, without messages."""

    total: float
    attention: float = 0.0
    """Of it, that of attention between tokens; 0 if unknown."""


class PartSeconds(NamedTuple):
    """The two passes of a part."""

    forward: PassSeconds
    backward: PassSeconds


class Machine(Protocol):
    """How fast a rank is."""

    overlaps: bool
    """Whether gathering parameters and reducing gradients go on while a rank computes."""

    def part(self, planned: PlannedLayout, name: PartName, layer: int) -> PartSeconds:
        """Return the time of a part."""

    def update(self, planned: PlannedLayout, numbers: int) -> float:
        """Return the time of an optimizer step on `numbers` parameters."""

    def collective(self, traffic: Traffic, *, size: int, stride: int) -> float:
        """Return the time of messages between `size` ranks, of which neighbors are `stride` ranks apart."""


class RatedMachine(Machine):
    """A rank that reaches the rates of its cluster."""

    def __init__(self, cluster: Cluster, counter: PartCounter) -> None:
        self.cluster = cluster
        self.overlaps = cluster.overlaps
        self.counter = counter

    def part(self, planned: PlannedLayout, name: PartName, layer: int) -> PartSeconds:
        counts = self.counter.count(planned.config, name, layer)
        return PartSeconds(self._seconds(counts.forward, planned), self._seconds(counts.backward, planned))

    def update(self, planned: PlannedLayout, numbers: int) -> float:
        return _UPDATE_BYTES * numbers / (self.cluster.memory_gigabytes_per_second * 1e9)

    def collective(self, traffic: Traffic, *, size: int, stride: int) -> float:
        network = self.cluster.network(size=size, stride=stride)
        seconds = sent_bytes(traffic, size) / (network.gigabytes_per_second * 1e9)
        return seconds + traffic.calls * network.latency_microseconds * 1e-6

    def _seconds(self, counts: Pass, planned: PlannedLayout) -> PassSeconds:
        cluster = self.cluster
        slower = cluster.slower_in_fp32 if planned.activation_bytes > 2 else 1.0
        products = counts.product_flops / (cluster.product_teraflops * 1e12)
        attention = slower * counts.attention_flops / (cluster.attention_teraflops * 1e12)
        passes = cluster.fusion * counts.moved / (cluster.memory_gigabytes_per_second * 1e9)
        device = slower * products + attention + passes
        return PassSeconds(max(device, counts.kernels * cluster.kernel_microseconds * 1e-6), attention)


def sent_bytes(traffic: Traffic, size: int) -> float:
    """Return what each of `size` ranks sends if collectives go around in a ring."""
    others = (size - 1) / size
    share = {"all-reduce": 2 * others, "all-gather": others, "reduce-scatter": others, "all-to-all": others}
    return traffic.bytes * share.get(traffic.kind, 1.0)


def collectives(machine: Machine, traffic: Iterable[Traffic], *, size: int, stride: int) -> float:
    """Return the time of several kinds of messages, one after the other."""
    return sum(machine.collective(each, size=size, stride=stride) for each in traffic)
