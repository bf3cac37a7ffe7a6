"""Runs a training step of every kind of rank of a layout, without the ranks, and plans the run's checkpoint."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_tf.checkpoint.shard_files import Written
from megatron_tf.config import RunConfig
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.mesh import Mesh, replicas_of
from megatron_tf.training.dry_run.checkpoint_plan import (
    CheckpointPlan,
    Placement,
    placements,
    plan_checkpoint,
    plan_stage,
)
from megatron_tf.training.dry_run.collectives import Traffic
from megatron_tf.training.dry_run.fake_world import META_KERNELS, fake_rank
from megatron_tf.training.dry_run.observed_step import held_tensors, observe_step
from megatron_tf.training.run.checkpointing import new_record, saved_record
from megatron_tf.training.step.state import TrainState, build_state


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of the mesh."""

    tensor: int
    pipeline: int
    data: int
    shard_size: int
    """Number of data-parallel ranks that share one copy of the parameters, each with its context-parallel ranks."""
    context: int = 1


@dataclass(frozen=True)
class KindOfRank:
    """What one of several ranks that compute alike holds and exchanges."""

    stage: int
    count: int
    """Number of ranks of this kind."""
    example: tuple[int, int]
    """Of the one that was run: its tensor-parallel rank, and that among data- and context-parallel ranks together."""
    layers: Sequence[tuple[int, int]]
    """Of each of its stages: the first layer, and the one after the last."""
    parameters: int
    """Parameters that the rank holds and updates."""
    parameter_bytes: int
    optimizer_bytes: int
    """Of both Adam moments."""
    peak_bytes: int
    """Peak of a step: parameters, optimizer state, gathered parameters, gradients, activations and temporaries."""
    traffic: Sequence[Traffic]
    """Messages of one step."""


@dataclass(frozen=True)
class DryRun:
    """The result for a whole layout."""

    layout: Layout
    micro_batches: int
    """Of each data-parallel rank in one step."""
    kinds: Sequence[KindOfRank]
    checkpoint: CheckpointPlan


def dry_run(
    config: RunConfig, world_size: int, on_stage: Callable[[int, int], None] | None = None, *, phase: int = 0
) -> DryRun:
    """Run a step of one rank of each kind on a world of `world_size` ranks, and plan the checkpoint after it.

    Uses the model and the layout of the run's first stage of growth, and the sequence length and batch size after the
    first `phase` phases of its data. `on_stage` is called with the index of each pipeline stage, and their number,
    before it is run. Raises UserError if the configuration does not fit the ranks.
    """
    run = config.at_stage(0, phase)
    config = dataclasses.replace(run, kernels=META_KERNELS)
    layout = layout_of(config, world_size)
    kinds: list[KindOfRank] = []
    written: list[Written] = []
    record = new_record(run, {})
    for stage in range(layout.pipeline):
        if on_stage is not None:
            on_stage(stage, layout.pipeline)
        with _rank_at(layout, stage) as mesh:
            state = build_state(config, mesh)
            ranks = list(placements(state))
            record = saved_record(state, run, record)
            kinds.append(_run(state, config, _alike(ranks, ranks[0])))
        written += plan_stage(stage, ranks)
        kinds += _other_kinds(config, layout, stage=stage, ranks=ranks)
    training = config.training
    micro_batches = training.global_batch_size // (training.micro_batch_size * layout.data)
    return DryRun(layout=layout, micro_batches=micro_batches, kinds=kinds, checkpoint=plan_checkpoint(record, written))


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """Return the layout that a configuration has on `world_size` ranks. Raises LayoutError if it does not fit them."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data = replicas_of(parallel, world_size)
    shard_size = parallel.data_parallel_shard_size or data
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        shard_size=shard_size,
        context=parallel.context_parallel_size,
    )


def _rank_at(layout: Layout, stage: int, tensor: int = 0, data: int = 0) -> contextlib.AbstractContextManager[Mesh]:
    """Join a fake world as the rank at these coordinates."""
    return fake_rank(
        (stage * layout.data * layout.context + data) * layout.tensor + tensor,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data,
        context=layout.context,
        shard_size=layout.shard_size,
    )


def _other_kinds(config: RunConfig, layout: Layout, *, stage: int, ranks: Sequence[Placement]) -> Iterator[KindOfRank]:
    """Run the ranks of a stage that hold other numbers of rows than its first one, one of each kind."""
    first_of_kind = {rank.rows: rank for rank in reversed(ranks)}
    for rows, rank in sorted(first_of_kind.items(), key=lambda item: (item[1].tensor, item[1].data)):
        if rows == ranks[0].rows:
            continue
        with _rank_at(layout, stage, tensor=rank.tensor, data=rank.data) as mesh:
            yield _run(build_state(config, mesh), config, _alike(ranks, rank))


def _alike(ranks: Sequence[Placement], rank: Placement) -> int:
    return sum(other.rows == rank.rows for other in ranks)


def _run(state: TrainState, config: RunConfig, count: int) -> KindOfRank:
    """Run a step, and describe the `count` ranks that are like this one."""
    mesh = state.mesh
    parameter_bytes = sum(shard.tensor.nbytes for shard in state.shards)
    held = sum(tensor.nbytes for tensor in held_tensors(state))
    parameters = sum(shard.tensor.numel() for shard in state.shards)
    observation = observe_step(state, config)
    return KindOfRank(
        stage=mesh.rank("pp"),
        count=count,
        example=(mesh.rank("tp"), mesh.rank("dp_cp")),
        layers=[_layers(stage) for stage in state.stages],
        parameters=parameters,
        parameter_bytes=parameter_bytes,
        optimizer_bytes=held - parameter_bytes,
        peak_bytes=observation.meter.peak,
        traffic=observation.counter.traffic(),
    )


def _layers(stage: TokenFormer) -> tuple[int, int]:
    layers = [int(layer) for layer in stage.layers]
    return layers[0], layers[-1] + 1
