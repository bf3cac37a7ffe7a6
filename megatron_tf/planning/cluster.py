"""What a layout runs on: ranks, their memory and rates, and the networks between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config import ConfigError, parse_config
from megatron_tf.config.load import read_mapping
from megatron_tf.config.types import STRICT, Count, Number

Positive = Annotated[Number, Field(gt=0)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Network:
    """What connects ranks."""

    gigabytes_per_second: Positive
    """That a rank sends, while it receives as many, in a collective of large messages."""
    latency_microseconds: Positive
    """Time of a collective of one number."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Cluster:
    """Ranks that are alike, several on each node."""

    nodes: Count
    ranks_per_node: Count
    memory_gib: Positive
    """Memory of a rank that a run may fill."""
    product_teraflops: Positive
    """TFLOP/s that the matrix products of a layer reach in 16 bits."""
    attention_teraflops: Positive
    """TFLOP/s that attention between tokens reaches in 16 bits."""
    memory_gigabytes_per_second: Positive
    """Rate at which a rank reads and writes its memory in the passes between products."""
    fusion: Positive = 1.0
    """Share of the bytes of these passes that is left when they are fused, of those that eager operations move."""
    kernel_microseconds: Annotated[Number, Field(ge=0)] = 0.0
    """Time for which the host is busy with one operation; a step never takes less than all of them."""
    slower_in_fp32: Positive = 8.0
    """How much slower products and attention are in fp32."""
    within_node: Network
    between_nodes: Network
    overlaps: bool = True
    """Whether gathering parameters and reducing gradients go on while a rank computes."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def memory_bytes(self) -> int:
        """Return the memory of a rank."""
        return int(self.memory_gib * 2**30)

    def network(self, *, size: int, stride: int) -> Network:
        """Return the network between `size` ranks of which neighbors are `stride` ranks apart."""
        return self.within_node if size * stride <= self.ranks_per_node else self.between_nodes


def _nvlink_cluster(
    nodes: int, *, ranks: int, memory_gib: float, peak: float, bandwidth: float, nvlink: float, link: float
) -> Cluster:
    """Return a cluster of GPUs, given the rates of their data sheets: TFLOP/s in 16 bits, and GB/s in one direction.

    How much of them a step reaches was measured on one H200 (docs/performance.md): products 730 of 989 TFLOP/s,
    attention 300, other passes 0.65 of 4.8 TB/s on 0.18 of the bytes of eager operations, and the host 28 microseconds
    for each of these operations. That collectives reach 80 % is an assumption.
    """
    return Cluster(
        nodes=nodes,
        ranks_per_node=ranks,
        memory_gib=memory_gib,
        product_teraflops=0.74 * peak,
        attention_teraflops=0.3 * peak,
        memory_gigabytes_per_second=0.65 * bandwidth,
        fusion=0.18,
        kernel_microseconds=28,
        within_node=Network(gigabytes_per_second=0.8 * nvlink, latency_microseconds=20),
        between_nodes=Network(gigabytes_per_second=0.8 * link, latency_microseconds=40),
    )


def _h100(nodes: int) -> Cluster:
    return _nvlink_cluster(nodes, ranks=8, memory_gib=74, peak=989, bandwidth=3350, nvlink=450, link=50)


PRESETS: Mapping[str, Cluster] = {
    "laptop": Cluster(
        nodes=1,
        ranks_per_node=1,
        memory_gib=12,
        product_teraflops=0.3,
        attention_teraflops=0.15,
        memory_gigabytes_per_second=20,
        slower_in_fp32=2,
        within_node=Network(gigabytes_per_second=1, latency_microseconds=200),
        between_nodes=Network(gigabytes_per_second=0.1, latency_microseconds=1000),
        overlaps=False,
    ),
    "8xH100": _h100(1),
    "64xH100": _h100(8),
    "1024xH100": _h100(128),
    "8xH200": _nvlink_cluster(1, ranks=8, memory_gib=134, peak=989, bandwidth=4800, nvlink=450, link=50),
    "8xB200": _nvlink_cluster(1, ranks=8, memory_gib=172, peak=2250, bandwidth=8000, nvlink=900, link=50),
    "72xGB200": _nvlink_cluster(1, ranks=72, memory_gib=178, peak=2500, bandwidth=8000, nvlink=900, link=50),
}
"""Clusters by name."""


def load_cluster(name: str) -> Cluster:
    """Return a preset, or read a cluster from a YAML file with the keys of `Cluster`.

    Raises ConfigError for a name that is neither, and for a file with unknown keys or invalid values.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"no cluster {name!r}: choose {', '.join(PRESETS)}, or give a YAML file")
    return parse_config(
        Cluster, read_mapping(path, expected="keys of a cluster (nodes:, ranks_per_node:, ...)"), source=str(path)
    )
