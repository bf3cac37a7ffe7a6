"""Plans of a run: its layouts by predicted time, those that fit the memory first."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tf.config import RunConfig
from megatron_tf.planning.candidates import find_candidates
from megatron_tf.planning.cluster import Cluster
from megatron_tf.planning.counts import PartCounter
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.memory import Peak, peak_memory
from megatron_tf.planning.messages import rank_messages
from megatron_tf.planning.rates import Machine
from megatron_tf.planning.time import StepTime, step_time
from megatron_tf.tokenformer.sizes import training_flops
from megatron_tf.training.dry_run.collectives import Traffic

_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class SizedLayout:
    """A layout, and the memory that its fullest rank needs."""

    planned: PlannedLayout
    peak: Peak
    memory_bytes: int
    """Memory of a rank that a run may fill."""

    @property
    def missing_bytes(self) -> int:
        """Return how much memory the fullest rank lacks; 0 if the layout fits."""
        return max(0, self.peak.bytes - self.memory_bytes)

    @property
    def keys(self) -> dict[str, dict[str, Any]]:
        """Return the keys of the configuration that make this layout, by section."""
        config = self.planned.config
        chosen = {
            "parallel": (
                "tensor_model_parallel_size",
                "context_parallel_size",
                "context_parallel_method",
                "pipeline_model_parallel_size",
                "pipeline_schedule",
                "num_virtual_stages_per_pipeline_rank",
                "data_parallel_size",
                "data_parallel_shard_size",
                "sequence_parallel",
            ),
            "training": ("micro_batch_size", "recompute_granularity"),
        }
        return {
            section: {key: getattr(getattr(config, section), key) for key in keys} for section, keys in chosen.items()
        }


@dataclass(frozen=True, kw_only=True)
class Plan(SizedLayout):
    """A layout that fits, and how long a step takes."""

    time: StepTime

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of a global batch."""
        training = self.planned.config.training
        return training.global_batch_size * training.seq_length

    @property
    def model_flops_per_second(self) -> float:
        """Return the FLOP/s of the model on each rank, without what is recomputed."""
        config = self.planned.config
        flops = training_flops(config.model, config.training.seq_length) * self.tokens_per_step
        return flops / self.time.total / self.planned.world_size

    def device_hours(self, steps: int) -> float:
        """Return the hours of `steps` steps, summed over devices."""
        return steps * self.time.total * self.planned.world_size / _HOUR


@dataclass(frozen=True)
class Ranking:
    """All layouts of one model on one cluster."""

    cluster: Cluster
    fitting: Sequence[Plan]
    """By predicted time, the fastest first."""
    too_large: Sequence[SizedLayout]
    """By missing memory, the least first."""
    impossible: Mapping[str, int]
    """Why the configuration forbids layouts -> how many."""


Track = Callable[[Sequence[PlannedLayout]], Iterable[PlannedLayout]]


def rank_layouts(
    config: RunConfig,
    cluster: Cluster,
    *,
    machine: Machine,
    counter: PartCounter,
    track: Track = iter,
) -> Ranking:
    """Rank all layouts of a configuration, which has no growth ahead, on all ranks of a cluster.

    `track` passes the layouts on, one after another, and may show progress.
    """
    found = find_candidates(config, world_size=cluster.world_size, ranks_per_node=cluster.ranks_per_node)
    fitting: list[Plan] = []
    too_large: list[SizedLayout] = []
    for planned in track(found.layouts):
        sized = SizedLayout(planned=planned, peak=peak_memory(planned, counter), memory_bytes=cluster.memory_bytes)
        if sized.missing_bytes:
            too_large.append(sized)
        else:
            fitting.append(with_time(sized, step_time(planned, machine, counter)))
    fitting.sort(key=lambda plan: plan.time.total)
    too_large.sort(key=lambda sized: sized.missing_bytes)
    return Ranking(cluster=cluster, fitting=fitting, too_large=too_large, impossible=dict(found.reasons))


def with_time(sized: SizedLayout, time: StepTime) -> Plan:
    """Add the time of a step to a layout."""
    return Plan(planned=sized.planned, peak=sized.peak, memory_bytes=sized.memory_bytes, time=time)


def busiest_messages(plan: Plan, counter: PartCounter) -> list[Traffic]:
    """Return the messages of the pipeline rank that exchanges most."""
    planned = plan.planned
    each = [rank_messages(planned, rank, counter) for rank in range(planned.layout.pipeline)]
    return max(each, key=lambda messages: sum(traffic.bytes for traffic in messages))
