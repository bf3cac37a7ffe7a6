"""Configurations for the planner, and for the dry runs that it is compared with."""

from dataclasses import replace

from megatron_tf.planning.cluster import Cluster, Network
from tests.support.layouts import layout_config

MODEL = {"num_layers": 4, "hidden_size": 64, "qkv_tokens": 64, "proj_tokens": 48, "ffn_tokens": 256, "vocab_size": 1000}
LATENCY, RATE = 100e-6, 0.5e9
"""Seconds of a message, and bytes a second, of a slow network."""


def slow_cluster(ranks, **rates):
    """Describe a node of ranks on a slow network, over which nothing overlaps; keywords replace what is given here."""
    network = Network(gigabytes_per_second=RATE / 1e9, latency_microseconds=LATENCY * 1e6)
    values = {"product_teraflops": 1, "attention_teraflops": 1, "memory_gigabytes_per_second": 100, "overlaps": False}
    return Cluster(
        nodes=1,
        ranks_per_node=ranks,
        memory_gib=1,
        within_node=network,
        between_nodes=network,
        **values | rates,
    )


def config_of(layout, *, micro_batches=None, shard_size=None, context=(1, "ring"), **sections):
    """Configure a small bf16 run on (tensor, pipeline, data), with (context-parallel size, method)."""
    micro_batches = micro_batches or (2 if layout[1] == 1 else 4)
    training = {"seq_length": 128, "micro_batch_size": 2, "global_batch_size": 2 * micro_batches * layout[2]}
    training |= {"precision": "bf16"} | sections.pop("training", {})
    config = layout_config(
        layout, training=training, model=MODEL | sections.pop("model", {}), kernels={"pattention": "eager"}, **sections
    )
    keys = {"context_parallel_size": context[0], "context_parallel_method": context[1]}
    return replace(config, parallel=replace(config.parallel, data_parallel_shard_size=shard_size, **keys))
