"""The training state of a rank: its stage of the model, its optimizer, and the runner of micro-batches."""

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
from megatron_tf.model.parallelize import (
    build_stage,
    choose_computation,
    initialize,
    micro_batch_shapes,
    parameter_shards,
    product_sizes,
    warm_up_kernels,
)
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.pipeline import Runner, make_runner
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.dtypes import activation_dtype
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.observability.step_timer import StepTimer
from megatron_tf.training.step.batch_sizes import check_batch_sizes
from megatron_tf.training.step.loss_scale import LossScaler
from megatron_tf.training.step.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """This rank's stage of the model and everything needed to train it.

    A step changes the model's parameters (whose storage `shards` are), the optimizer and the scaler; the other fields
    do not change until the next growth.
    """

    mesh: Mesh
    model: TokenFormer
    shards: Sequence[RowShard]
    """The rows of the parameters that this rank holds."""
    optimizer: Optimizer
    scaler: LossScaler
    runner: Runner
    kernels: Kernels
    """The implementations that the model uses."""
    timer: StepTimer
    """Measures the phases of each step."""


def build_state(config: RunConfig, mesh: Mesh, *, timer: StepTimer | None = None) -> TrainState:
    """Build this rank's part of a new run, with initial values.

    Raises UserError if the layout is impossible, or if requested kernels can't be built.
    """
    check_batch_sizes(config, mesh.size("pp"), mesh.size("dp"))
    precision = config.training.precision
    dtype = activation_dtype(precision)
    model = _build_model(config, mesh, dtype)
    kernels = _build_kernels(model, config, mesh=mesh, dtype=dtype)
    shards = parameter_shards(model)
    initialize(shards, config.model, config.training.seed)
    return TrainState(
        mesh=mesh,
        model=model,
        shards=shards,
        optimizer=_build_optimizer(model, config, mesh=mesh, shards=shards, implementation=kernels.optimizer),
        scaler=LossScaler(config.loss_scale, precision == "fp16"),
        runner=_build_runner(model, config, mesh=mesh, dtype=dtype),
        kernels=kernels,
        timer=timer or StepTimer(),
    )


def _build_model(config: RunConfig, mesh: Mesh, dtype: torch.dtype) -> TokenFormer:
    """Build this rank's stage, uninitialized."""
    training, parallel = config.training, config.parallel
    model = build_stage(
        config.model,
        mesh,
        seq_length=training.seq_length,
        sequence_parallel=parallel.sequence_parallel,
        dtype=dtype,
        reshard_after_forward=parallel.reshard_after_forward,
    )
    if training.hidden_dropout or training.attention_dropout:
        model.dropout = Dropout(
            hidden_rate=training.hidden_dropout, attention_rate=training.attention_dropout, seed=training.seed
        )
    return model


def _build_runner(model: TokenFormer, config: RunConfig, *, mesh: Mesh, dtype: torch.dtype) -> Runner:
    training, parallel = config.training, config.parallel
    shapes = micro_batch_shapes(
        config.model,
        mesh,
        size=training.micro_batch_size,
        seq_length=training.seq_length,
        sequence_parallel=parallel.sequence_parallel,
        dtype=dtype,
    )
    return make_runner(
        model,
        shapes=shapes,
        mesh=mesh,
        schedule=parallel.pipeline_schedule,
        reshard=parallel.reshard_after_forward,
    )


def _build_kernels(model: TokenFormer, config: RunConfig, *, mesh: Mesh, dtype: torch.dtype) -> Kernels:
    """Choose the kernels, the same on every rank, and install them in the model. Collective."""
    training = config.training
    rows = training.micro_batch_size * training.seq_length
    kernels = choose_kernels(_requested_kernels(config), mesh.device, dtype)
    if training.precision == "fp8":
        sizes = product_sizes(config.model, mesh, rows)
        kernels = with_fp8_products(kernels, training.fp8_scaling, device=mesh.device, sizes=sizes)
    choose_computation(model, kernels, training.recompute_granularity)
    failure = warm_up_kernels(model, mesh, rows=rows, dtype=dtype)
    if failure is not None:
        kernels = without_pattention_kernels(kernels, failure)
        choose_computation(model, kernels, training.recompute_granularity)
    return kernels


def _requested_kernels(config: RunConfig) -> dict[str, Any]:
    """Return the configured kernels, with SDPA where dropout or determinism requires it."""
    requested = to_dict(config.kernels)
    needs_sdpa = config.training.attention_dropout or config.training.deterministic
    return requested | {"attention": "sdpa"} if needs_sdpa else requested


def _build_optimizer(
    model: TokenFormer, config: RunConfig, *, mesh: Mesh, shards: Sequence[RowShard], implementation: str
) -> Optimizer:
    is_tied = not config.model.untie_embeddings_and_output_weights
    return Optimizer(
        parameters=list(model.parameters()),
        shards=shards,
        declared=model_parameters(config.model),
        config=config.optimizer,
        mesh=mesh,
        tied_group=mesh.end_stages if is_tied else None,
        implementation=implementation,
    )
