"""A run from its start to its end: restore, train stage after stage of growth, stop."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.commit import newest_checkpoint
from megatron_tf.checkpoint.lock import LockedError, RunLock
from megatron_tf.checkpoint.record import Identity, RunRecord
from megatron_tf.config import ConfigError, RunConfig, to_dict
from megatron_tf.data.batch import DocumentMasking
from megatron_tf.data.build import build_dataset, build_loader, build_validation, check_tokenizer
from megatron_tf.data.tokenizer import TYPES, Tokenizer, build_tokenizer
from megatron_tf.errors import UserError
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.parallel.mesh import LayoutError, Mesh, data_parallel_size
from megatron_tf.parallel.signals import EXIT_START_AGAIN, SignalCatcher, exit_code
from megatron_tf.parallel.watch import Watch
from megatron_tf.tokenformer.sizes import parameter_count
from megatron_tf.training.checkpointing import blend_of
from megatron_tf.training.loop import Loop, Tools
from megatron_tf.training.metrics import MetricsLog
from megatron_tf.training.phases import Phases
from megatron_tf.training.preflight import preflight
from megatron_tf.training.profiling import Profiler
from megatron_tf.training.resumable import Resumable, open_resumable
from megatron_tf.training.resume import Resume, has_layout
from megatron_tf.training.state import TrainState, build_state, check_batches
from megatron_tf.training.stopping import Stopping


def train(
    config: RunConfig,
    mesh: Mesh,
    *,
    signals: SignalCatcher,
    data: Sequence[Identity],
    end: Callable[[str | None], None],
    resumable: Resumable | None,
) -> int:
    """Run until `train_iters` steps are done, growing on the way where the configuration says so; on every rank.

    Ends before, with all saved, on SIGTERM, SIGUSR1 and Ctrl-C, when its time is up, and where a stage of growth has
    another layout: the run is then to be started again. Returns the exit code. `data` are the identities of the
    training sets, `resumable` is the checkpoint that gave the ranks their layout. `end` ends the process when ranks
    wait for each other too long, with the reason.

    Raises UserError for what a user can fix: LostRankError where a rank is lost, DivergedError where the model does
    not train any more.
    """
    began = time.monotonic()
    phases = Phases()
    training, limit = config.training, config.parallel.distributed_timeout_seconds
    with ExitStack() as open_:
        signals.stop_at_next_step()
        stopping = Stopping(mesh, signals, training.exit_duration_in_mins, began)
        open_.enter_context(Watch(mesh.store, phases.now, limit, end))
        _hold_lock(config, mesh, open_, end)
        tokenizer = _tokenizer(config)
        check_tokenizer(config, tokenizer)

        def build(staged: RunConfig) -> TrainState:
            return build_state(staged, mesh, phases)

        resume = Resume(config, mesh, tokenizer.identity, build, data)
        run = resume.restore(resumable)
        record = run.record
        _check_stages(config, mesh, run.stage)
        validation = build_validation(config) if training.eval_interval else []
        warnings = preflight(config.at_stage(run.stage), mesh)
        log = open_.enter_context(_open_log(config, mesh, record.training.step))
        for warning in (*run.damaged, *warnings):
            log.say(f"warning: {warning}")
        if run.changes:
            log.say(run.changes)
        saver = open_.enter_context(_saver(mesh, timedelta(seconds=limit), log))
        dataset = build_dataset(config, blend_of(record))
        masking = DocumentMasking(tokenizer.eod, config.data.eod_mask_loss, config.data.reset_attention_mask)
        loader = open_.enter_context(
            build_loader(
                dataset, training=training, mesh=mesh, masking=masking, consumed_samples=record.training.samples
            )
        )
        tools = Tools(loader, validation, log, saver, stopping, phases, Profiler(config.logging, mesh), began)
        _say_kernels(run.state.kernels, log)
        _announce("start", config.at_stage(run.stage), mesh, record, log, run.origin)
        if _is_done(record, config):
            log.say(f"nothing is left to do: {run.origin} is at the last of {record.training.step} steps (train_iters)")
        while True:
            loop = Loop(config, run, tools, resume.reload_into)
            record = loop.run()
            if _is_done(record, config):
                return 0
            if stopping.reason:
                return _stopped(config, record, stopping, log)
            del loop, run  # the larger model needs their memory
            assert config.checkpoint.save is not None
            resumable = open_resumable(config, newest_checkpoint(config.checkpoint.save))
            if not has_layout(config.at_stage(resumable.stage).parallel, mesh):
                _say_layout_changes(record, log)
                return EXIT_START_AGAIN
            run = resume.restore(resumable)
            _say_kernels(run.state.kernels, log)
            _announce("growth", config.at_stage(run.stage), mesh, run.record, log, config.checkpoint.save)


def _is_done(record: RunRecord, config: RunConfig) -> bool:
    return record.training.step == config.training.train_iters and not record.details.evaluation_due


def _say_layout_changes(record: RunRecord, log: MetricsLog) -> None:
    step = record.training.step
    log.say(f"step {step:>6}  the next stage has another layout: start the same command again")


def _saver(mesh: Mesh, limit: timedelta, log: MetricsLog) -> BackgroundSaver:
    return BackgroundSaver(
        mesh.new_world(limit),
        lambda path: log.say(f"saved {path}"),
        lambda reason: log.say(f"warning: {reason}; training goes on until the next save"),
    )


def _say_kernels(kernels: Kernels, log: MetricsLog) -> None:
    if kernels.warning:
        log.say(f"warning: {kernels.warning}")
    if kernels.taken:
        log.say(f"kernels: auto took {kernels.taken}")


def _tokenizer(config: RunConfig) -> Tokenizer:
    data = config.data
    key = "tokenizer_model" if data.tokenizer_type in TYPES else "tokenizer_type"
    try:
        return build_tokenizer(data.tokenizer_type, data.tokenizer_model, eod_token=data.eod_token)
    except (UserError, OSError) as error:
        raise ConfigError(f"data.{key}: {error}") from error


def _open_log(config: RunConfig, mesh: Mesh, step: int) -> MetricsLog:
    """Raises ConfigError on every rank where the first one can't open its sinks."""
    failure, log = None, None
    try:
        log = MetricsLog(config.logging, step, config.training.train_iters, mesh.is_first_rank)
    except (UserError, OSError) as error:
        failure = str(error)
    if reason := mesh.first_failure(failure):
        raise ConfigError(reason)
    assert log is not None
    return log


def _hold_lock(config: RunConfig, mesh: Mesh, open_: ExitStack, end: Callable[[str | None], None]) -> None:
    """Let no other run write into `checkpoint.save` until the stack is closed. Raises ConfigError on every rank."""
    refusal = None
    if mesh.is_first_rank and config.checkpoint.save is not None:
        try:
            open_.enter_context(RunLock(config.checkpoint.save, end))
        except LockedError as error:
            refusal = str(error)
        except OSError:
            pass  # the preflight says what is wrong with the directory, for every rank
    if reason := mesh.first_failure(refusal):
        raise ConfigError(reason)


def _check_stages(config: RunConfig, mesh: Mesh, first: int) -> None:
    """Raise ConfigError where a stage of growth to come has a layout or batches that do not fit these ranks."""
    num_ranks = 1 if mesh.world is None else mesh.world.size()
    for number in range(first, len(config.growth)):
        staged = config.at_stage(number + 1)
        parallel = staged.parallel
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        try:
            replicas = data_parallel_size(
                num_ranks,
                tensor=tensor,
                pipeline=pipeline,
                asked=parallel.data_parallel_size,
                shard_size=parallel.data_parallel_shard_size,
            )
            check_batches(staged, pipeline, replicas)
        except (ConfigError, LayoutError) as error:
            raise ConfigError(f"growth[{number}]: {error}") from None


def _stopped(config: RunConfig, record: RunRecord, stopping: Stopping, log: MetricsLog) -> int:
    """Say where the run stands; the exit code."""
    save = config.checkpoint.save
    saved = f"saved in {save}" if save else "not saved: no checkpoint.save"
    log.say(f"step {record.training.step:>6}  stopped by {stopping.reason}, {saved}: start the same command again")
    return exit_code(stopping.number, is_saved=save is not None) if stopping.number else EXIT_START_AGAIN


def _announce(
    event: str, config: RunConfig, mesh: Mesh, record: RunRecord, log: MetricsLog, origin: Path | None
) -> None:
    parameters = parameter_count(config.model)
    layout = {axis: mesh.size(axis) for axis in ("tp", "pp", "dp")}
    log.event(
        {
            "event": event,
            "step": record.training.step,
            "tokens": record.training.tokens,
            "flops": record.usage.flops,
            "device_hours": record.usage.device_seconds / 3600,
            "parameters": parameters,
            "layout": layout,
            "lineage": [event.to_json() for event in record.lineage],
            "config": to_dict(config),
        }
    )
    places = " x ".join(f"{axis} {size}" for axis, size in layout.items())
    if event == "growth":
        log.say(f"step {record.training.step:>6}  grown to {parameters:,} parameters")
    else:
        where = f"going on from {origin} at step {record.training.step}" if origin else "a new run"
        log.say(f"{parameters:,} parameters on {places} ({mesh.device.type}); {where}")
