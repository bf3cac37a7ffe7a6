"""What a run trains: the stage of the model on this rank, its optimizer, and the runner of its micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tf.config import RunConfig, to_dict
from megatron_tf.kernels.dispatch import Kernels, choose_kernels, without_pattention_kernels
from megatron_tf.layers.dropout import Dropout
from megatron_tf.model.parallelize import (
    build_stage,
    choose_computation,
    initialize,
    micro_batch_shapes,
    parameter_shards,
    token_loss,
    warm_up_kernels,
)
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.mesh import Mesh, first_and_last_stage_group
from megatron_tf.parallel.pipeline import Runner, make_runner
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.dtypes import DTYPES
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.observability.step_timer import StepTimer
from megatron_tf.training.step.batch_sizes import check_batch_sizes
from megatron_tf.training.step.loss_scale import LossScaler
from megatron_tf.training.step.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """This rank's part of what is trained, and the means to train it.

    A step changes the model's parameters (by `shards`, which are their storage), the optimizer and the scaler; the
    other fields stay as they are until the next growth.
    """

    mesh: Mesh
    model: TokenFormer
    shards: Sequence[RowShard]
    """The rows of parameters this rank holds."""
    optimizer: Optimizer
    scaler: LossScaler
    runner: Runner
    kernels: Kernels
    """What the model computes with."""
    timer: StepTimer
    """Told what a step is doing."""


def build_state(config: RunConfig, mesh: Mesh, *, timer: StepTimer | None = None) -> TrainState:
    """This rank's part of a new run, with its initial values.

    Raises UserError for a layout that cannot be, and for kernels that can't be built.
    """
    check_batch_sizes(config, mesh.size("pp"), mesh.size("dp"))
    dtype = DTYPES[config.training.precision]
    model = _build_model(config, mesh, dtype)
    kernels = _build_kernels(model, config, mesh=mesh, dtype=dtype)
    shards = parameter_shards(model)
    initialize(shards, config.model, config.training.seed)
    return TrainState(
        mesh=mesh,
        model=model,
        shards=shards,
        optimizer=_build_optimizer(model, config, mesh=mesh, shards=shards, implementation=kernels.optimizer),
        scaler=LossScaler(config.loss_scale, config.training.precision == "fp16"),
        runner=_build_runner(model, config, mesh=mesh, dtype=dtype),
        kernels=kernels,
        timer=timer or StepTimer(),
    )


def _build_model(config: RunConfig, mesh: Mesh, dtype: torch.dtype) -> TokenFormer:
    """The stage of this rank, without values."""
    training, parallel = config.training, config.parallel
    model = build_stage(
        config.model,
        mesh,
        seq_length=training.seq_length,
        sequence_parallel=parallel.sequence_parallel,
        dtype=dtype,
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
    return make_runner(model, token_loss(mesh), shapes=shapes, mesh=mesh, schedule=parallel.pipeline_schedule)


def _build_kernels(model: TokenFormer, config: RunConfig, *, mesh: Mesh, dtype: torch.dtype) -> Kernels:
    """The kernels that the model computes with from here on; the same on every rank, which all call it."""
    training = config.training
    kernels = choose_kernels(_requested_kernels(config), mesh.device, dtype)
    choose_computation(model, kernels, training.recompute_granularity)
    failure = warm_up_kernels(model, mesh, rows=training.micro_batch_size * training.seq_length, dtype=dtype)
    if failure is not None:
        kernels = without_pattention_kernels(kernels, failure)
        choose_computation(model, kernels, training.recompute_granularity)
    return kernels


def _requested_kernels(config: RunConfig) -> dict[str, Any]:
    """The configured kernels, without what `auto` would take and cannot drop or repeat every bit."""
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
        tied_group=first_and_last_stage_group(mesh) if is_tied else None,
        implementation=implementation,
    )
