"""The training loop: restore, step, report, evaluate, save."""

import time
from collections.abc import Iterator

import torch

from megatron_tf.config import RunConfig, to_dict
from megatron_tf.data.blend import Samples
from megatron_tf.data.tokenizer import build_tokenizer
from megatron_tf.model.sizes import parameter_count
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.checkpointing import (
    Progress,
    checkpoint_to_read,
    new_progress,
    restore_state,
    save_state,
)
from megatron_tf.training.datasets import build_dataset, build_loader, check_tokenizer
from megatron_tf.training.metrics import MetricsLog
from megatron_tf.training.schedule import learning_rate
from megatron_tf.training.state import TrainState, build_state
from megatron_tf.training.step import evaluation_loss, train_step


def train(config: RunConfig, mesh: Mesh) -> Progress:
    """Run until `train_iters` steps are done; on every rank of the mesh.

    Raises ValueError (ConfigError, DataError, CheckpointError among them) for what a user can mend.
    """
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    check_tokenizer(config, tokenizer)
    state = build_state(config, mesh, tokenizer.eod)
    progress = restore_state(state, config, tokenizer.identity)
    resumed = progress is not None
    progress = progress or new_progress(config.model, tokenizer.identity)
    training = config.training
    validation = build_dataset(config, "validation") if training.eval_interval else None
    with (
        build_loader(build_dataset(config, "train"), training, mesh, progress.samples) as loader,
        MetricsLog(config.logging, progress.step, training.train_iters, mesh.is_first_rank) as log,
    ):
        _announce(config, mesh, progress, log, resumed)
        return _loop(config, state, progress, loader, validation, log)


def _loop(
    config: RunConfig,
    state: TrainState,
    progress: Progress,
    loader: Iterator[torch.Tensor],
    validation: Samples | None,
    log: MetricsLog,
) -> Progress:
    training, checkpoint = config.training, config.checkpoint
    samples, tokens = training.global_batch_size, training.global_batch_size * training.seq_length
    while progress.step < training.train_iters:
        start = time.perf_counter()
        lr = learning_rate(config.optimizer, progress.step, training.train_iters)
        result = train_step(state, next(loader), lr)
        progress = progress.after_step(samples, tokens)
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": lr}
        log.step(progress.step, progress.tokens, tokens, time.perf_counter() - start, values)
        done = progress.step == training.train_iters
        if validation is not None and (progress.step % training.eval_interval == 0 or done):
            log.validation(progress.step, _validate(config, state, validation))
        if checkpoint.save and (done or (checkpoint.save_interval and progress.step % checkpoint.save_interval == 0)):
            path = save_state(state, config, progress, checkpoint.save)
            log.say(f"step {progress.step:>6}/{training.train_iters}  saved {path}")
    return progress


def _validate(config: RunConfig, state: TrainState, dataset: Samples) -> float:
    """Mean loss over the first `eval_iters` global batches of the validation split."""
    iters = config.training.eval_iters
    with build_loader(dataset, config.training, state.mesh, 0) as loader:
        return sum(evaluation_loss(state, next(loader)) for _ in range(iters)) / iters


def _announce(config: RunConfig, mesh: Mesh, progress: Progress, log: MetricsLog, resumed: bool) -> None:
    parameters = parameter_count(config.model)
    layout = {axis: mesh.size(axis) for axis in ("tp", "pp", "dp")}
    log.event(
        {
            "event": "start",
            "step": progress.step,
            "parameters": parameters,
            "layout": layout,
            "lineage": list(progress.lineage),
            "config": to_dict(config),
        }
    )
    origin = f"going on from {checkpoint_to_read(config)} at step {progress.step}" if resumed else "a new run"
    places = " x ".join(f"{axis} {size}" for axis, size in layout.items())
    log.say(f"{parameters:,} parameters on {places} ({mesh.device.type}); {origin}")
