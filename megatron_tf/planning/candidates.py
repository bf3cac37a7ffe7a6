"""All layouts of a configuration on a cluster that are worth a look."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import ValidationError

from megatron_tf.config import ConfigError, ContextParallelMethod, RunConfig
from megatron_tf.config.errors import message_of
from megatron_tf.errors import UserError
from megatron_tf.parallel.schedules import SCHEDULES
from megatron_tf.planning.layout import ModelStages, PlannedLayout

_SCHEDULES: Sequence[tuple[str, int | None]] = (
    ("1f1b", None),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 3),
    ("interleaved_zero_bubble", 2),
    ("zbv", None),
    ("dualpipev", None),
)
"""Schedules, with the number of stages on each rank where there is a choice; gpipe is never faster than 1f1b."""
_LARGEST_MICRO_BATCH = 32
_SHORTEST_PART = 2048  # tokens of a sequence on a context-parallel rank; shorter parts make products small


@dataclass
class Candidates:
    """The layouts that a configuration allows, and why it forbids the others."""

    layouts: list[PlannedLayout] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why layouts are impossible -> how many."""


def find_candidates(config: RunConfig, *, world_size: int, ranks_per_node: int) -> Candidates:
    """Find all layouts on `world_size` ranks: sizes of the mesh, schedule, shards, micro-batch and recomputation.

    Tensor parallelism stays within a node, with the activations sharded along the sequence. Context-parallel ranks have
    at least 2,048 tokens of each sequence, or are as many as in `config`. What it requires besides (such as
    reshard_after_forward, or tp_comm_overlap_chunks with tensor parallelism) stays.
    """
    found, model = Candidates(), ModelStages(config.model, config.training.seq_length)
    for parallel in _meshes(config, world_size, ranks_per_node):
        is_split = SCHEDULES[parallel["pipeline_schedule"]].splits_backward
        sizes = _micro_batches(config, parallel["data_parallel_size"])
        for size, recompute in itertools.product(sizes, _recomputations(config, is_split)):
            training = {"micro_batch_size": size, "recompute_granularity": recompute}
            try:
                changed = with_keys(config, parallel=parallel, training=training)
                found.layouts.append(PlannedLayout(changed, world_size, model))
            except UserError as error:
                found.reasons[str(error)] += 1
    return found


def with_keys(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Return the configuration with keys of sections replaced. Raises ConfigError if they are invalid."""
    try:
        changed = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
        return dataclasses.replace(config, **changed)
    except ValidationError as error:
        raise ConfigError(message_of(error.errors()[0])) from None


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, in ascending order."""
    return [i for i in range(1, number + 1) if number % i == 0]


def _meshes(config: RunConfig, world_size: int, ranks_per_node: int) -> Iterator[dict[str, Any]]:
    """Yield the keys of `parallel` of every mesh, its schedules and its ways to shard."""
    pairs = itertools.product(divisors(world_size), divisors(world_size), _contexts(config))
    for tensor, pipeline, (context, method) in pairs:
        data, rest = divmod(world_size, tensor * pipeline * context)
        if rest or tensor > ranks_per_node or pipeline > config.model.num_layers:
            continue
        schedules = _SCHEDULES if pipeline > 1 else _SCHEDULES[:1]
        shard_sizes = _shard_sizes(data, tensor * context, ranks_per_node)
        for (schedule, virtual), shard_size in itertools.product(schedules, shard_sizes):
            yield {
                "tensor_model_parallel_size": tensor,
                "context_parallel_size": context,
                "context_parallel_method": method,
                "pipeline_model_parallel_size": pipeline,
                "pipeline_schedule": schedule,
                "num_virtual_stages_per_pipeline_rank": virtual,
                "pipeline_model_parallel_layout": None,
                "data_parallel_size": data,
                "data_parallel_shard_size": shard_size,
                "sequence_parallel": tensor > 1,
                "tp_comm_overlap_chunks": config.parallel.tp_comm_overlap_chunks if tensor > 1 else 1,
            }


def _contexts(config: RunConfig) -> list[tuple[int, ContextParallelMethod]]:
    """Return context-parallel sizes with their methods: those that leave each rank enough of a sequence, and that of
    the configuration."""
    parallel, length = config.parallel, config.training.seq_length
    sizes = {size for size in divisors(length) if size <= length // _SHORTEST_PART} | {parallel.context_parallel_size}
    several = itertools.product(sorted(sizes - {1}), get_args(ContextParallelMethod))
    return [(1, parallel.context_parallel_method), *several]


def _shard_sizes(data: int, others: int, ranks_per_node: int) -> list[int]:
    """Return the numbers of data-parallel ranks to shard over: one, those of a node, all; each is `others` ranks."""
    within_node = max((each for each in divisors(data) if each * others <= ranks_per_node), default=1)
    return sorted({1, within_node, data})


def _micro_batches(config: RunConfig, data: int) -> list[int]:
    """Return the powers of two that divide a data-parallel rank's part of the batch."""
    share, rest = divmod(config.training.global_batch_size, data)
    sizes = [2**i for i in range(_LARGEST_MICRO_BATCH.bit_length())]
    return [1] if rest else [size for size in sizes if size == 1 or share % size == 0]


def _recomputations(config: RunConfig, is_split: bool) -> list[str]:
    if is_split:  # they keep much between the halves of a backward, whatever is recomputed
        return ["none"]
    return ["none", "selective", "full"] if config.model.layer == "tokenformer" else ["none", "full"]
