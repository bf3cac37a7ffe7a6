"""The training state of a rank: its stages of the model, its optimizer, and the runner of micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tf.config import RunConfig, to_dict
from megatron_tf.kernels.dispatch import (
    Kernels,
    choose_kernels,
    with_fp8_products,
    without_pattention_kernels,
)
from megatron_tf.layers.dropout import Dropout
from megatron_tf.layers.head_exchange import share_sequences
from megatron_tf.model.parallelize import (
    build_stages,
    choose_computation,
    initialize,
    micro_batch_shapes,
    parameter_shards,
    parameters_of,
    product_sizes,
    warm_up_kernels,
)
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.pipeline import Runner, make_runner
from megatron_tf.parallel.schedules import SCHEDULES
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.dtypes import activation_dtype
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.observability.step_timer import StepTimer
from megatron_tf.training.step.batch_sizes import check_batch_sizes
from megatron_tf.training.step.loss_scale import LossScaler
from megatron_tf.training.step.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """This rank's stages of the model and everything needed to train them.

    A step changes the stages' parameters (whose storage `shards` are), the optimizer and the scaler; the other fields
    do not change until the next growth.
    """

    mesh: Mesh
    stages: Sequence[TokenFormer]
    """One stage of the pipeline, or several virtual ones, in the order of the model."""
    shards: Sequence[RowShard]
    """The rows of the parameters that this rank holds."""
    optimizer: Optimizer
    scaler: LossScaler
    runner: Runner
    kernels: Kernels
    """The implementations that the model uses."""
    timer: StepTimer
    """Measures the phases of each step."""

    @property
    def model(self) -> TokenFormer:
        """Return the only stage of this rank: the whole model without pipeline parallelism."""
        (stage,) = self.stages
        return stage


def build_state(config: RunConfig, mesh: Mesh, *, timer: StepTimer | None = None) -> TrainState:
    """Build this rank's part of a new run, with initial values.

    Raises UserError if the layout is impossible, or if requested kernels can't be built.
    """
    check_batch_sizes(config, mesh.size("pp"), mesh.size("dp"))
    precision = config.training.precision
    dtype = activation_dtype(precision)
    stages = _build_stages(config, mesh, dtype)
    kernels = _build_kernels(stages, config, mesh=mesh, dtype=dtype)
    shards = parameter_shards(*stages, mesh=mesh)
    initialize(shards, config.model, config.training.seed)
    return TrainState(
        mesh=mesh,
        stages=stages,
        shards=shards,
        optimizer=_build_optimizer(stages, config, mesh=mesh, shards=shards, implementation=kernels.optimizer),
        scaler=LossScaler(config.loss_scale, precision == "fp16"),
        runner=_build_runner(stages, config, mesh=mesh, dtype=dtype),
        kernels=kernels,
        timer=timer or StepTimer(),
    )


def _build_stages(config: RunConfig, mesh: Mesh, dtype: torch.dtype) -> list[TokenFormer]:
    """Build this rank's stages, uninitialized."""
    training = config.training
    stages = build_stages(config.model, config.parallel, mesh, seq_length=training.seq_length, dtype=dtype)
    if training.hidden_dropout or training.attention_dropout:
        for stage in stages:
            stage.dropout = Dropout(
                hidden_rate=training.hidden_dropout, attention_rate=training.attention_dropout, seed=training.seed
            )
    return stages


def _build_runner(stages: Sequence[TokenFormer], config: RunConfig, *, mesh: Mesh, dtype: torch.dtype) -> Runner:
    training, parallel = config.training, config.parallel
    shapes = micro_batch_shapes(
        config.model,
        mesh,
        size=training.micro_batch_size,
        seq_length=training.seq_length,
        sequence_parallel=parallel.sequence_parallel,
        dtype=dtype,
    )
    schedule, reshard = parallel.pipeline_schedule, parallel.reshard_after_forward
    return make_runner(stages, shapes=shapes, mesh=mesh, schedule=schedule, reshard=reshard)


def _build_kernels(stages: Sequence[TokenFormer], config: RunConfig, *, mesh: Mesh, dtype: torch.dtype) -> Kernels:
    """Choose the kernels, the same on every rank, and install them in the stages. Collective."""
    training = config.training
    kernels = choose_kernels(_requested_kernels(config), mesh.device, dtype)
    kernels = share_sequences(kernels, stages[0].context)
    if training.precision == "fp8":
        sizes = product_sizes(config.model, config.parallel, mesh, _tokens_at_once(config))
        kernels = with_fp8_products(kernels, training.fp8_scaling, device=mesh.device, sizes=sizes)
    failure = _install_kernels(stages, kernels, config, mesh=mesh, dtype=dtype)
    if failure is not None:
        kernels = without_pattention_kernels(kernels, failure)
        _install_kernels(stages, kernels, config, mesh=mesh, dtype=dtype)
    return kernels


def _install_kernels(
    stages: Sequence[TokenFormer], kernels: Kernels, config: RunConfig, *, mesh: Mesh, dtype: torch.dtype
) -> str | None:
    """Install kernels, and compile them if needed; return the first reason why a rank can't. Collective."""
    training = config.training
    splits_backward = mesh.size("pp") > 1 and SCHEDULES[config.parallel.pipeline_schedule].splits_backward
    failures = []
    for stage in stages:
        choose_computation(stage, kernels, training.recompute_granularity, splits_backward=splits_backward)
        failures.append(warm_up_kernels(stage, mesh, rows=_tokens_at_once(config), dtype=dtype))
    return next(filter(None, failures), None)


def _tokens_at_once(config: RunConfig) -> int:
    """Return the number of tokens that this rank has of each micro-batch."""
    training = config.training
    return training.micro_batch_size * training.seq_length // config.parallel.context_parallel_size


def _requested_kernels(config: RunConfig) -> dict[str, Any]:
    """Return the configured kernels, with SDPA where dropout, determinism or a ring requires it."""
    requested, parallel = to_dict(config.kernels), config.parallel
    is_ring = parallel.context_parallel_size > 1 and parallel.context_parallel_method == "ring"
    needs_sdpa = config.training.attention_dropout or config.training.deterministic or is_ring
    return requested | {"attention": "sdpa"} if needs_sdpa else requested


def _build_optimizer(
    stages: Sequence[TokenFormer], config: RunConfig, *, mesh: Mesh, shards: Sequence[RowShard], implementation: str
) -> Optimizer:
    is_tied = not config.model.untie_embeddings_and_output_weights
    # in a V, one rank has both copies
    is_on_two_ranks = is_tied and not SCHEDULES[config.parallel.pipeline_schedule].is_v
    return Optimizer(
        parameters=parameters_of(stages),
        shards=shards,
        declared=model_parameters(config.model),
        config=config.optimizer,
        mesh=mesh,
        tied_group=mesh.end_stages if is_on_two_ranks else None,
        implementation=implementation,
    )
