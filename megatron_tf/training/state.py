"""What a run trains: the stage of the model on this rank, its optimizer, and the runner of its micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tf.config import ConfigError, ModelConfig, OptimizerConfig, RunConfig, to_dict
from megatron_tf.kernels.dispatch import Kernels, choose_kernels, without_pattention_kernels
from megatron_tf.layers.dropout import Dropout
from megatron_tf.model.parallelize import (
    build_stage,
    choose_computation,
    initialize,
    mean_token_loss,
    micro_batch_shapes,
    parameter_shards,
    warm_up_kernels,
)
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.mesh import Mesh, first_and_last_stage_group
from megatron_tf.parallel.pipeline import Runner, make_runner
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.loss_scale import LossScaler
from megatron_tf.training.optimizer import Optimizer
from megatron_tf.training.phases import Phases

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Boundaries:
    """What an end of document means in a sample."""

    eod: int
    mask_loss: bool
    reset_attention: bool


@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the means to run it."""

    mesh: Mesh
    model: TokenFormer
    shards: Sequence[RowShard]
    """The rows of parameters this rank holds."""
    optimizer: Optimizer
    runner: Runner
    scaler: LossScaler
    boundaries: Boundaries
    kernels: Kernels
    phases: Phases
    """Told what a step is doing."""


def build_state(config: RunConfig, mesh: Mesh, eod: int, phases: Phases | None = None) -> TrainState:
    """This rank's part of a new run, with its initial values; `eod` is the id that ends a document.

    Raises UserError for a layout that cannot be, and for kernels that can't be built.
    """
    training, parallel = config.training, config.parallel
    dtype = DTYPES[training.precision]
    check_batch_sizes(config, mesh)
    shapes = micro_batch_shapes(
        config.model, mesh, training.micro_batch_size, training.seq_length, parallel.sequence_parallel, dtype
    )
    model = build_stage(config.model, mesh, training.seq_length, parallel.sequence_parallel, dtype)
    if training.hidden_dropout or training.attention_dropout:
        model.dropout = Dropout(
            hidden_rate=training.hidden_dropout, attention_rate=training.attention_dropout, seed=training.seed
        )
    kernels = _build_kernels(model, config, mesh, dtype)
    shards = parameter_shards(model)
    initialize(shards, config.model, training.seed)
    runner = make_runner(model, mean_token_loss(mesh), shapes, mesh, parallel.pipeline_schedule)
    optimizer = _build_optimizer(model, shards, config.model, config.optimizer, mesh, kernels.optimizer)
    boundaries = Boundaries(eod, config.data.eod_mask_loss, config.data.reset_attention_mask)
    scaler = LossScaler(config.loss_scale, training.precision == "fp16")
    return TrainState(mesh, model, shards, optimizer, runner, scaler, boundaries, kernels, phases or Phases())


def check_batch_sizes(config: RunConfig, mesh: Mesh) -> None:
    """Raise ConfigError, with the numbers, where a batch does not split into micro-batches of every replica, or into
    too few of them for the pipeline's schedule."""
    check_batches(config, mesh.size("pp"), mesh.size("dp"))


def check_batches(config: RunConfig, stages: int, replicas: int) -> None:
    """As `check_batch_sizes`, for a layout that is yet to come."""
    training = config.training
    for size in training.batch_sizes:
        whole = size == training.global_batch_size
        key = "training.global_batch_size" if whole else "a batch of training.rampup_batch_size"
        count, rest = divmod(size, training.micro_batch_size * replicas)
        if rest:
            raise ConfigError(
                f"{key} ({size}) must be divisible by "
                f"training.micro_batch_size ({training.micro_batch_size}) x data-parallel size ({replicas})"
            )
        if config.parallel.pipeline_schedule == "1f1b" and stages > 1 and count < stages:
            raise ConfigError(
                f"the 1f1b schedule over {stages} stages needs at least as many micro-batches, {key} ({size}) "
                f"gives {count} on each of {replicas} replicas: raise it, lower micro_batch_size, or choose gpipe"
            )


def _build_kernels(model: TokenFormer, config: RunConfig, mesh: Mesh, dtype: torch.dtype) -> Kernels:
    """The kernels that the model computes with from here on; the same on every rank, which all call it."""
    training = config.training
    kernels = choose_kernels(_asked_kernels(config), mesh.device, dtype)
    choose_computation(model, kernels, training.recompute_granularity)
    failure = warm_up_kernels(model, training.micro_batch_size * training.seq_length, dtype, mesh)
    if failure is not None:
        kernels = without_pattention_kernels(kernels, failure)
        choose_computation(model, kernels, training.recompute_granularity)
    return kernels


def _asked_kernels(config: RunConfig) -> dict[str, Any]:
    """The configured kernels, without what `auto` would take and cannot drop or repeat every bit."""
    asked = to_dict(config.kernels)
    needs_sdpa = config.training.attention_dropout or config.training.deterministic
    return asked | {"attention": "sdpa"} if needs_sdpa else asked


def _build_optimizer(
    model: TokenFormer,
    shards: Sequence[RowShard],
    model_config: ModelConfig,
    config: OptimizerConfig,
    mesh: Mesh,
    implementation: str,
) -> Optimizer:
    tied_group = None if model_config.untie_embeddings_and_output_weights else first_and_last_stage_group(mesh)
    return Optimizer(
        parameters=list(model.parameters()),
        shards=shards,
        declared=model_parameters(model_config),
        config=config,
        mesh=mesh,
        tied_group=tied_group,
        implementation=implementation,
    )
