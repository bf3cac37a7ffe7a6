"""The messages of a rank in a training step, by axis of the mesh: how many, and their bytes.

They equal those that a dry run counts (`tests/unit/planning/test_against_dry_run.py`). Those between tensor- and
context-parallel ranks are counted in the parts of the model; the others follow from the layout:

| axis | messages |
|---|---|
| dp, with cp: dp_cp | FSDP gathers each layer, and the rest of a stage, and reduces their gradients: once in a step, or with reshard_after_forward in every micro-batch |
| pp | hidden states and their gradients between neighboring stages on different ranks, and in a run's first step one number each |
| cp | keys, values and their gradients, or heads: in the parts of the model, too |
| tied | the gradient of a tied embedding, between the first and the last rank |
| each | the loss, the norms of all parameters, the agreement whether to stop |
"""  # noqa: E501

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from megatron_tf.planning.counts import PartCounter
from megatron_tf.planning.layout import PlannedLayout, Unit
from megatron_tf.tokenformer.parameters import Module
from megatron_tf.training.dry_run.collectives import Traffic, add_up

_NUMBER = 8  # bytes of fp64 and int64
_STOP = 4 * _NUMBER  # what the ranks tell each other about stopping
_GREETING = 4


def rank_messages(planned: PlannedLayout, rank: int, counter: PartCounter) -> list[Traffic]:
    """Return the messages of a pipeline rank in the first step of a run, as a dry run lists them."""
    found = [*_within_parts(planned, rank, counter), *_data(planned, rank), *_pipeline(planned, rank)]
    return add_up([*found, *_tied(planned, rank), *_numbers(planned)])


def _times(traffic: Iterable[Traffic], count: int) -> list[Traffic]:
    return [replace(each, calls=each.calls * count, bytes=each.bytes * count) for each in traffic]


def _within_parts(planned: PlannedLayout, rank: int, counter: PartCounter) -> Iterator[Traffic]:
    for stage in planned.stages_of(rank):
        for parts in planned.stages[stage].parts:
            counts = counter.count(planned.config, parts.name, parts.layer)
            traffic = [*counts.forward.traffic, *counts.backward.traffic]
            yield from _times(traffic, parts.count * planned.micro_batches)


def _data(planned: PlannedLayout, rank: int) -> Iterator[Traffic]:
    for unit in planned.units_of(rank):
        yield from unit_messages(planned, unit)


def unit_messages(planned: PlannedLayout, unit: Unit) -> Iterator[Traffic]:
    """Yield the messages of data parallelism for a unit in a step."""
    layout = planned.layout
    times = planned.micro_batches if planned.config.parallel.reshard_after_forward else 1
    spans_world = layout.data == planned.world_size
    if planned.sharing > 1:
        within_copies = "dp_shard" if layout.context == 1 else "dp_shard_cp"
        axis = _replicas(planned) if planned.copies == 1 else within_copies
        gathers = 2 * times if planned.reshards(unit) else times
        yield Traffic("all-gather", axis, calls=gathers, bytes=gathers * gathered_bytes(planned, unit))
        reduced = planned.gathered(unit) * planned.parameter_bytes
        yield Traffic("reduce-scatter", axis, calls=times, bytes=times * reduced)
    if planned.copies > 1:
        axis = "dp" if spans_world and layout.shard_size == 1 else "dp_replicate"
        yield Traffic("all-reduce", axis, calls=times, bytes=times * planned.held(unit) * planned.parameter_bytes)


def _replicas(planned: PlannedLayout) -> str:
    """Return the axis of the ranks that compute from the same parameters; one that spans the world has its group."""
    context = planned.layout.context
    if context == planned.world_size:
        return "cp"
    return "dp" if context == 1 else "dp_cp"


def gathered_bytes(planned: PlannedLayout, unit: Unit) -> int:
    """Return the bytes of a unit when it is gathered: layers in the dtype of activations, the rest in its own."""
    return planned.gathered(unit) * (planned.activation_bytes if unit.is_layer else planned.parameter_bytes)


def hidden_bytes(planned: PlannedLayout) -> int:
    """Return the bytes of the hidden states of a micro-batch that a rank passes to the next stage."""
    training, parallel = planned.config.training, planned.config.parallel
    length = planned.length // (planned.layout.tensor if parallel.sequence_parallel else 1)
    return length * training.micro_batch_size * planned.config.model.hidden_size * planned.activation_bytes


def neighbors(planned: PlannedLayout, rank: int) -> int:
    """Return how many boundaries between a stage of this rank and one of another rank there are."""
    mine = set(planned.stages_of(rank))
    ends = [other for stage in mine for other in (stage - 1, stage + 1) if other not in mine]
    return sum(0 <= other < planned.config.parallel.num_stages for other in ends)


def _pipeline(planned: PlannedLayout, rank: int) -> Sequence[Traffic]:
    if planned.layout.pipeline == 1:
        return []
    count = neighbors(planned, rank)
    calls = count * (planned.micro_batches + 1)
    size = count * (planned.micro_batches * hidden_bytes(planned) + _GREETING)
    return [Traffic(kind, "pp", calls=calls, bytes=size) for kind in ("send", "receive")]


def _tied(planned: PlannedLayout, rank: int) -> Iterator[Traffic]:
    if planned.is_v or planned.config.model.untie_embeddings_and_output_weights:
        return
    for unit in planned.units_of(rank):
        parameters = [each for each in unit.parameters if each.module is Module.EMBEDDING]
        if parameters:
            yield Traffic(
                "all-reduce", "tied", calls=1, bytes=planned.held(Unit(parameters, False)) * planned.parameter_bytes
            )


def _numbers(planned: PlannedLayout) -> Iterator[Traffic]:
    layout, data = planned.layout, planned.config.data
    replicas = _replicas(planned)
    sizes = {"tp": layout.tensor, replicas: layout.data * layout.context, "pp": layout.pipeline}
    for axis, size in sizes.items():
        if size > 1:
            yield Traffic("all-reduce", axis, calls=1, bytes=_NUMBER * planned.num_parameters)
    for axis in (replicas, "pp"):  # the mean of the loss
        if sizes[axis] > 1:
            yield Traffic("all-reduce", axis, calls=1, bytes=_NUMBER)
    has_mask = data.eod_mask_loss or data.loss_mask or data.packing == "best_fit"
    if has_mask and layout.data > 1:  # the number of targets
        yield Traffic("all-reduce", "dp", calls=1, bytes=_NUMBER)
    used = [axis for axis, size in sizes.items() if size > 1]
    if used:  # an axis that spans the world is its group
        yield Traffic("all-reduce", used[0] if len(used) == 1 else "world", calls=1, bytes=_STOP)
