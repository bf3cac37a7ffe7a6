"""All layouts of a configuration on a cluster that are worth a look."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megatron_tf.config import ConfigError, RunConfig
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


@dataclass
class Candidates:
    """The layouts that a configuration allows, and why it forbids the others."""

    layouts: list[PlannedLayout] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why layouts are impossible -> how many."""


def find_candidates(config: RunConfig, *, world_size: int, ranks_per_node: int) -> Candidates:
    """Find all layouts on `world_size` ranks: sizes of the mesh, schedule, shards, micro-batch and recomputation.

    Tensor parallelism stays within a node, with the activations sharded along the sequence. What `config` requires
    besides (such as reshard_after_forward) stays. Raises UserError for context parallelism, which is not planned.
    """
    if config.parallel.context_parallel_size > 1:
        raise UserError(
            f"plan does not know context parallelism, but parallel.context_parallel_size is "
            f"{config.parallel.context_parallel_size}: plan with 1, and compare sizes with megatron-tf dry-run"
        )
    found, model = Candidates(), ModelStages(config.model, config.training.seq_length)
    for parallel in _meshes(config, world_size, ranks_per_node):
        data = world_size // (parallel["tensor_model_parallel_size"] * parallel["pipeline_model_parallel_size"])
        is_split = SCHEDULES[parallel["pipeline_schedule"]].splits_backward
        for size, recompute in itertools.product(_micro_batches(config, data), _recomputations(config, is_split)):
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
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, in ascending order."""
    return [i for i in range(1, number + 1) if number % i == 0]


def _meshes(config: RunConfig, world_size: int, ranks_per_node: int) -> Iterator[dict[str, Any]]:
    """Yield the keys of `parallel` of every mesh, its schedules and its ways to shard."""
    for tensor, pipeline in itertools.product(divisors(world_size), repeat=2):
        if tensor > ranks_per_node or world_size % (tensor * pipeline) or pipeline > config.model.num_layers:
            continue
        data = world_size // (tensor * pipeline)
        schedules = _SCHEDULES if pipeline > 1 else _SCHEDULES[:1]
        for (schedule, virtual), shard_size in itertools.product(schedules, _shard_sizes(data, tensor, ranks_per_node)):
            yield {
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
                "pipeline_schedule": schedule,
                "num_virtual_stages_per_pipeline_rank": virtual,
                "pipeline_model_parallel_layout": None,
                "data_parallel_size": data,
                "data_parallel_shard_size": shard_size,
                "sequence_parallel": tensor > 1,
            }


def _shard_sizes(data: int, tensor: int, ranks_per_node: int) -> list[int]:
    """Return the numbers of ranks to shard over: one, those of a node, all of them."""
    within_node = max((each for each in divisors(data) if each * tensor <= ranks_per_node), default=1)
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
