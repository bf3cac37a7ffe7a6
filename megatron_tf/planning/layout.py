"""A configuration on a number of ranks, and which layers and parameters each pipeline rank has."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_tf.config import ModelConfig, ParallelConfig, RunConfig
from megatron_tf.model.parallelize import layers_of_stages
from megatron_tf.parallel.schedules import SCHEDULES
from megatron_tf.parallel.stages import stages_of_rank
from megatron_tf.parallel.timeline import Action, Pipeline, orders
from megatron_tf.planning.parts import PartName
from megatron_tf.tokenformer.dtypes import activation_dtype, parameter_dtype
from megatron_tf.tokenformer.parameters import Module, Parameter, model_parameters
from megatron_tf.training.dry_run.dry_run import Layout, layout_of
from megatron_tf.training.step.batch_sizes import check_batch_sizes


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers and reduces together: those of a layer, or those of a stage outside its layers."""

    parameters: Sequence[Parameter]
    is_layer: bool


@dataclass(frozen=True)
class Parts:
    """Neighboring parts of a stage that are alike: `count` layers with as many tokens, or one other part."""

    name: PartName
    layer: int
    """The first of the layers; 0 for other parts."""
    count: int
    unit: Unit | None
    """The parameters of one of them that a step uses here first."""


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline."""

    parts: Sequence[Parts]
    """In the order of a forward."""
    units: Sequence[Unit]

    @property
    def has_head(self) -> bool:
        """Return whether it is the last stage."""
        return self.parts[-1].name == "head"


class ModelStages:
    """What all layouts of a model share: its stages by their number, and the orders of pipelines, each made once."""

    def __init__(self, model: ModelConfig, seq_length: int) -> None:
        self.model = model
        self.seq_length = seq_length
        self.parameters = model_parameters(model)
        self._by_layer: dict[int | None, list[Parameter]] = {}
        for parameter in self.parameters.values():
            self._by_layer.setdefault(parameter.layer, []).append(parameter)
        self._made: dict[tuple[int, ...], list[Stage]] = {}
        self._orders: dict[Pipeline, list[list[Action]]] = {}

    def of(self, parallel: ParallelConfig) -> list[Stage]:
        """Return all stages of a pipeline, in the order of the model."""
        key = (parallel.num_stages, *(parallel.pipeline_model_parallel_layout or ()))
        if key not in self._made:
            layers = layers_of_stages(self.model, parallel, self.seq_length)
            self._made[key] = [self._stage(each) for each in layers]
        return self._made[key]

    def _stage(self, layers: range) -> Stage:
        is_first, is_last = layers.start == 0, layers.stop == self.model.num_layers
        is_tied = not self.model.untie_embeddings_and_output_weights
        others = [
            each
            for each in self._by_layer[None]
            if (is_first or (is_last and is_tied) if each.module is Module.EMBEDDING else is_last)
        ]
        units = [Unit(self._by_layer[layer], True) for layer in layers]
        rest = Unit(others, False) if others else None
        parts = [
            Parts("layer", alike[0], count=len(alike), unit=units[alike[0] - layers.start])
            for _, group in itertools.groupby(layers, key=self._tokens)
            if (alike := list(group))
        ]
        if is_first:
            parts.insert(0, Parts("embedding", 0, count=1, unit=rest))
        if is_last:
            parts.append(Parts("head", 0, count=1, unit=None if is_first else rest))
        return Stage(parts, [*units, *filter(None, [rest])])

    def _tokens(self, layer: int) -> tuple[int, ...]:
        return tuple(self.model.token_counts(kind)[layer] for kind in self.model.token_kinds)

    def orders(self, pipeline: Pipeline) -> list[list[Action]]:
        """Return what each rank of a pipeline computes, in order."""
        if pipeline not in self._orders:
            self._orders[pipeline] = orders(pipeline)
        return self._orders[pipeline]


class PlannedLayout:
    """One configuration, without growth stages ahead, on `world_size` ranks.

    Raises UserError if the configuration does not fit the ranks or its batches do not divide among them.
    """

    def __init__(self, config: RunConfig, world_size: int, model: ModelStages | None = None) -> None:
        self.config = config
        self.world_size = world_size
        self.layout: Layout = layout_of(config, world_size)
        check_batch_sizes(config, self.layout.pipeline, self.layout.data)
        training = config.training
        self.model = model or ModelStages(config.model, training.seq_length)
        self.num_parameters = len(self.model.parameters)
        """The number of tensors of the whole model."""
        self.stages: Sequence[Stage] = self.model.of(config.parallel)
        """All stages, in the order of the model."""
        self.micro_batches = training.global_batch_size // (training.micro_batch_size * self.layout.data)
        self.activation_bytes = activation_dtype(training.precision).itemsize
        self.parameter_bytes = parameter_dtype(training.precision).itemsize

    @property
    def pipeline(self) -> Pipeline:
        """Return the pipeline; with one rank, it is one stage."""
        parallel = self.config.parallel
        return Pipeline(
            parallel.pipeline_schedule, self.layout.pipeline, parallel.stages_per_rank, micro_batches=self.micro_batches
        )

    @property
    def is_v(self) -> bool:
        """Return whether the first and the last stage are on one rank."""
        return self.layout.pipeline == 1 or SCHEDULES[self.config.parallel.pipeline_schedule].is_v

    @property
    def length(self) -> int:
        """Return the tokens of each sequence on a context-parallel rank."""
        return self.config.training.seq_length // self.layout.context

    @property
    def sharing(self) -> int:
        """Return the number of ranks that share one copy of the parameters."""
        return self.layout.shard_size * self.layout.context

    @property
    def copies(self) -> int:
        """Return the number of copies of the parameters."""
        return self.layout.data // self.layout.shard_size

    @property
    def is_gathered(self) -> bool:
        """Return whether FSDP gathers the parameters and reduces their gradients."""
        return self.sharing * self.copies > 1

    def stages_of(self, rank: int) -> list[int]:
        """Return the numbers of the stages that a pipeline rank runs, in order."""
        return stages_of_rank(
            rank,
            ranks=self.layout.pipeline,
            per_rank=self.config.parallel.stages_per_rank,
            is_v=SCHEDULES[self.config.parallel.pipeline_schedule].is_v,
        )

    def rank_of(self, stage: int) -> int:
        """Return the pipeline rank that runs a stage."""
        return next(rank for rank in range(self.layout.pipeline) if stage in self.stages_of(rank))

    def units_of(self, rank: int) -> Iterator[Unit]:
        """Yield the units of all stages of a pipeline rank."""
        for stage in self.stages_of(rank):
            yield from self.stages[stage].units

    def rows(self, parameter: Parameter) -> int:
        """Return the rows of a parameter on one tensor-parallel rank."""
        return parameter.shape[0] // (self.layout.tensor if parameter.is_sharded else 1)

    def held(self, unit: Unit) -> int:
        """Return the numbers of a unit that the fullest rank of its shards holds."""
        return sum(-(-self.rows(each) // self.sharing) * _columns(each) for each in unit.parameters)

    def gathered(self, unit: Unit) -> int:
        """Return the numbers of a unit when it is gathered: every rank's part has the size of the largest."""
        return self.sharing * self.held(unit)

    def whole(self, unit: Unit) -> int:
        """Return the numbers of a unit on one tensor-parallel rank, without padding."""
        return sum(self.rows(each) * _columns(each) for each in unit.parameters)

    def reshards(self, unit: Unit) -> bool:
        """Return whether a unit is gathered and reduced in every micro-batch, and freed in between."""
        return self.config.parallel.reshard_after_forward and unit.is_layer and self.is_gathered

    def cast(self, unit: Unit, *, has_head: bool) -> int:
        """Return the numbers of a unit of which a step makes 16-bit copies for its products."""
        if self.activation_bytes == self.parameter_bytes or (self.is_gathered and unit.is_layer):
            return 0  # a gathered layer is in 16 bits already
        return sum(self.rows(each) * _columns(each) for each in unit.parameters if self._is_cast(each, has_head))

    def kept_between_halves(self, parts: Parts) -> int:
        """Return the bytes that one of the parts keeps between the halves of a split backward, more than before it.

        A Pattention keeps the gradients of the scores [T, N] next to the weights, which take the place of the scores,
        and the gradient of its output [T, D] unless it computes that of the values first.
        """
        model, training = self.config.model, self.config.training
        if parts.name != "layer" or model.layer != "tokenformer":
            return 0
        counts = {kind: model.token_counts(kind)[parts.layer] for kind in model.token_kinds}
        tokens = training.micro_batch_size * self.length
        scores = (2 * counts["qkv"] + sum(counts.values())) // self.layout.tensor
        outputs = 0 if training.recompute_granularity != "none" else 5 * model.hidden_size
        return (scores + outputs) * tokens * self.activation_bytes

    def _is_cast(self, parameter: Parameter, has_head: bool) -> bool:
        if parameter.module is Module.EMBEDDING:
            return has_head and not self.config.model.untie_embeddings_and_output_weights
        return len(parameter.shape) > 1


def _columns(parameter: Parameter) -> int:
    return math.prod(parameter.shape[1:])
