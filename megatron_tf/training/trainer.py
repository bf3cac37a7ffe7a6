"""The training loop: restore, step, report, evaluate, save, grow."""

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.config import ParallelConfig, RunConfig, to_dict
from megatron_tf.data.blend import Samples
from megatron_tf.data.loader import BatchLoader
from megatron_tf.data.tokenizer import build_tokenizer
from megatron_tf.model.sizes import parameter_count
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.checkpointing import (
    Progress,
    checkpoint_to_read,
    new_progress,
    restore_state,
    save_state,
    stage_reached,
)
from megatron_tf.training.datasets import build_dataset, build_loader, check_tokenizer
from megatron_tf.training.metrics import MetricsLog
from megatron_tf.training.schedule import learning_rate, rewarmup
from megatron_tf.training.state import TrainState, build_state
from megatron_tf.training.step import StepResult, evaluation_loss, train_step
from megatron_tf.training.stopping import Stopping


@dataclass(frozen=True)
class _Tools:
    """What a run works with, whatever its stage of growth."""

    loader: BatchLoader
    validation: Samples | None
    log: MetricsLog
    saver: BackgroundSaver
    stopping: Stopping


def train(config: RunConfig, mesh: Mesh) -> Progress:
    """Run until `train_iters` steps are done, growing on the way where the configuration says so; on every rank.

    Ends before, with all saved, on SIGTERM, on SIGUSR1, when its time is up, and where a stage of growth has another
    layout: the run is then to be started again. Raises ValueError (ConfigError, DataError, CheckpointError among them)
    for what a user can mend.
    """
    began = time.monotonic()
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    check_tokenizer(config, tokenizer)
    stage = stage_reached(config)
    state = build_state(config.at_stage(stage), mesh, tokenizer.eod)
    origin = checkpoint_to_read(config)
    progress = restore_state(state, config, tokenizer.identity)
    progress = progress or new_progress(config.model, tokenizer.identity)
    training = config.training
    validation = build_dataset(config, "validation") if training.eval_interval else None
    with (
        build_loader(build_dataset(config, "train"), training, mesh, progress.samples) as loader,
        MetricsLog(config.logging, progress.step, training.train_iters, mesh.is_first_rank) as log,
        BackgroundSaver(
            mesh.new_world(timedelta(seconds=config.parallel.distributed_timeout_seconds)),
            lambda path: log.say(f"saved {path}"),
            lambda reason: log.say(f"warning: {reason}; training goes on until the next save"),
        ) as saver,
        Stopping(mesh, training.exit_duration_in_mins, began) as stopping,
    ):
        tools = _Tools(loader, validation, log, saver, stopping)
        if state.kernels.taken:
            log.say(f"kernels: auto took {state.kernels.taken}")
        _announce("start", config.at_stage(stage), mesh, progress, log, origin)
        while True:
            progress = _run_stage(config, stage, state, progress, tools)
            if progress.step == training.train_iters:
                return progress
            if stopping.reason:
                saved = (
                    f"saved in {config.checkpoint.save}" if config.checkpoint.save else "not saved: no checkpoint.save"
                )
                log.say(f"step {progress.step:>6}  stopped by {stopping.reason}, {saved}: start the same command again")
                return progress
            del state  # the larger one needs its memory
            stage = stage_reached(config)
            if not _has_layout(config.at_stage(stage).parallel, mesh):
                log.say(f"step {progress.step:>6}  the next stage has another layout: start the same command again")
                return progress
            state = build_state(config.at_stage(stage), mesh, tokenizer.eod)
            grown = restore_state(state, config, tokenizer.identity)
            assert grown is not None
            progress = grown
            _announce("growth", config.at_stage(stage), mesh, progress, log, config.checkpoint.save)


def _run_stage(config: RunConfig, stage: int, state: TrainState, progress: Progress, tools: _Tools) -> Progress:
    """Steps until the run is done or asked to stop, or the next stage of growth is due; in each case all is saved."""
    staged, training, checkpoint = config.at_stage(stage), config.training, config.checkpoint
    following = config.growth[stage : stage + 1]
    is_due = is_stopped = False
    skipped_in_a_row = 0
    while progress.step < training.train_iters and not (is_due or is_stopped):
        start = time.perf_counter()
        samples = training.batch_size_at(progress.samples)
        tokens = samples * training.seq_length
        lr = _learning_rate(staged, progress)
        result = train_step(state, next(tools.loader), lr, progress.samples)
        if result.is_overflow:
            progress = progress.after_overflow(samples)
            _report_overflow(progress, state.scaler.scale, tools.log)
            continue
        if result.unsound:
            progress, skipped_in_a_row = progress.after_skip(samples), skipped_in_a_row + 1
            _report_skip(progress, result, tools.log)
            if skipped_in_a_row == training.max_skipped_steps:
                _give_up(staged, state, progress, result, tools)
            continue
        skipped_in_a_row = 0
        progress = progress.after_step(samples, tokens)
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": lr}
        if state.scaler.is_fp16:
            values["loss_scale"] = state.scaler.scale
        tools.log.step(progress.step, progress.tokens, tokens, time.perf_counter() - start, values)
        is_done = progress.step == training.train_iters
        is_due = any(growth.is_due(progress.step, progress.tokens) for growth in following)
        is_stopped = tools.stopping.agreed()
        if tools.validation is not None and not is_stopped and (progress.step % training.eval_interval == 0 or is_done):
            tools.log.validation(progress.step, _validate(staged, state, tools.validation))
        is_interval = checkpoint.save_interval and progress.step % checkpoint.save_interval == 0
        is_last = is_done or is_due or is_stopped
        if checkpoint.save and (is_last or is_interval):
            _save(staged, state, progress, checkpoint.save, tools, waits=is_last)
    return progress


def _report_overflow(progress: Progress, loss_scale: float, log: MetricsLog) -> None:
    log.event({"event": "overflow", "step": progress.step, "samples": progress.samples, "loss_scale": loss_scale})
    log.say(
        f"step {progress.step:>6}  gradients overflow in fp16, the loss scale is now {loss_scale:g}; the batch that "
        f"ends at sample {progress.samples:,} is skipped"
    )


def _report_skip(progress: Progress, result: StepResult, log: MetricsLog) -> None:
    names, more = ", ".join(result.unsound[:3]), len(result.unsound) - 3
    what = f"{names}{f' and {more} more' if more > 0 else ''}"
    log.event({"event": "skipped", "step": progress.step, "samples": progress.samples, "unsound": list(result.unsound)})
    log.say(
        f"step {progress.step:>6}  warning: not finite: {what}; the batch that ends at sample {progress.samples:,} is "
        f"skipped, {progress.skipped} so far"
    )


def _give_up(config: RunConfig, state: TrainState, progress: Progress, result: StepResult, tools: _Tools) -> NoReturn:
    """Save the state, which is the one before the batches that were skipped, and raise ArithmeticError."""
    saved = ""
    if config.checkpoint.save:
        _save(config, state, progress, config.checkpoint.save, tools, waits=True)
        saved = f"; {config.checkpoint.save} holds the state before them, started again the run goes on behind them"
    raise ArithmeticError(
        f"{config.training.max_skipped_steps} batches in a row were not finite in {result.unsound[0]} after step "
        f"{progress.step}{saved}: lower optimizer.lr, or look at the data"
    )


def _save(config: RunConfig, state: TrainState, progress: Progress, root: Path, tools: _Tools, waits: bool) -> None:
    save_state(state, config, progress, root, tools.saver)
    if waits or not config.checkpoint.async_save:
        tools.saver.wait()


def _learning_rate(config: RunConfig, progress: Progress) -> float:
    training = config.training
    step_tokens = training.batch_size_at(progress.samples) * training.seq_length
    lr = learning_rate(config.optimizer, progress.step, training.train_iters, progress.tokens, step_tokens)
    growth = progress.after_growth
    return lr * rewarmup(progress.step, growth["step"], growth["rewarmup_iters"]) if growth else lr


def _validate(config: RunConfig, state: TrainState, dataset: Samples) -> float:
    """Mean loss over the first `eval_iters` global batches of the validation split."""
    iters = config.training.eval_iters
    with build_loader(dataset, config.training, state.mesh, 0, is_training=False) as loader:
        return sum(evaluation_loss(state, next(loader)) for _ in range(iters)) / iters


def _has_layout(parallel: ParallelConfig, mesh: Mesh) -> bool:
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return sizes == (mesh.size("tp"), mesh.size("pp"))


def _announce(
    event: str, config: RunConfig, mesh: Mesh, progress: Progress, log: MetricsLog, origin: Path | None
) -> None:
    parameters = parameter_count(config.model)
    layout = {axis: mesh.size(axis) for axis in ("tp", "pp", "dp")}
    log.event(
        {
            "event": event,
            "step": progress.step,
            "tokens": progress.tokens,
            "parameters": parameters,
            "layout": layout,
            "lineage": list(progress.lineage),
            "config": to_dict(config),
        }
    )
    log.mark(progress.step, parameters, f"{event}: {parameters:,} parameters; lineage {list(progress.lineage)}")
    places = " x ".join(f"{axis} {size}" for axis, size in layout.items())
    if event == "growth":
        log.say(f"step {progress.step:>6}  grown to {parameters:,} parameters")
    else:
        where = f"going on from {origin} at step {progress.step}" if origin else "a new run"
        log.say(f"{parameters:,} parameters on {places} ({mesh.device.type}); {where}")
