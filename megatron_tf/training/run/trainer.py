"""A run from its start to its end: restore, train stage after stage of growth, stop."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.commit import newest_checkpoint
from megatron_tf.checkpoint.lock import LockedError, RunLock
from megatron_tf.checkpoint.record import Identity, RunRecord
from megatron_tf.config import ConfigError, RunConfig
from megatron_tf.data.batch import DocumentMasking
from megatron_tf.data.build import build_dataset, build_loader, build_validation, check_tokenizer
from megatron_tf.data.loader import BatchLoader
from megatron_tf.data.tokenizer import TYPES, Tokenizer, build_tokenizer
from megatron_tf.errors import UserError
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.parallel.collectives import group_size
from megatron_tf.parallel.mesh import LayoutError, Mesh, data_parallel_size
from megatron_tf.training.observability.metrics import MetricsLog
from megatron_tf.training.observability.observer import Observer, Observers, Stage
from megatron_tf.training.observability.profiling import Profiler
from megatron_tf.training.observability.reporter import Reporter
from megatron_tf.training.observability.step_timer import StepTimer
from megatron_tf.training.run.checkpointing import blend_of
from megatron_tf.training.run.context import RunContext
from megatron_tf.training.run.loop import Loop
from megatron_tf.training.run.resumable import Resumable, open_resumable
from megatron_tf.training.run.resume import RestoredRun, Resume, has_layout
from megatron_tf.training.step.batch_sizes import check_batch_sizes
from megatron_tf.training.step.state import build_state
from megatron_tf.training.supervision.preflight import preflight
from megatron_tf.training.supervision.signals import EXIT_START_AGAIN, SignalCatcher, exit_code
from megatron_tf.training.supervision.stop_signal import Stop, StopSignal
from megatron_tf.training.supervision.watchdog import Watchdog


def train(
    config: RunConfig,
    mesh: Mesh,
    *,
    signals: SignalCatcher,
    data: Sequence[Identity],
    end: Callable[[str | None], None],
    resumable: Resumable | None,
    observers: Sequence[Observer] = (),
) -> int:
    """Run until `train_iters` steps are done, growing on the way where the configuration says so; on every rank.

    Ends before, with all saved, on a signal, when its time is up, where a stage of growth has another layout, and when
    one of `observers` requests it. Returns the exit code. `data` are the identities of the training sets, `resumable`
    is the checkpoint that gave the ranks their layout; `end` ends the process, with the reason, when ranks wait for
    each other too long. Raises UserError for what a user can fix: LostRankError where a rank is lost, DivergedError
    where the model no longer trains.
    """
    timer = StepTimer()
    with ExitStack() as stack:
        signals.stop_at_next_step()
        stop_signal = StopSignal(mesh, signals, config.training.exit_duration_in_mins)
        limit = config.parallel.distributed_timeout_seconds
        stack.enter_context(Watchdog(mesh.store, now=timer.now, limit_seconds=limit, end=end))
        _hold_lock(config, mesh, stack, end=end)
        tokenizer = _tokenizer(config)
        build = partial(build_state, mesh=mesh, timer=timer)
        resume = Resume(config, mesh, tokenizer=tokenizer.identity, build=build, data=data)
        run = resume.restore(resumable)
        _check_stages(config, mesh, run.stage)
        validation = build_validation(config) if config.training.eval_interval else []
        warnings = [*run.damaged, *preflight(config.at_stage(run.stage), mesh)]
        log = stack.enter_context(_open_log(config, mesh, run.record.training.step))
        _say_warnings(warnings, run.changes, log)
        reporter = Reporter(log, config=config, mesh=mesh, timer=timer)
        everyone = Observers([reporter, Profiler(config.logging, mesh, reporter.on_profile), *observers])
        saver = stack.enter_context(_saver(config, mesh, log=log, observers=everyone))
        loader = stack.enter_context(_open_loader(config, mesh, record=run.record, tokenizer=tokenizer))
        context = RunContext(
            loader=loader,
            validation=validation,
            saver=saver,
            stop_signal=stop_signal,
            timer=timer,
            observers=everyone,
            say=log.say,
        )
        _report_start(config, run, reporter)
        while True:
            record, stop = Loop(config, run, context=context, reload=resume.reload_into).run()
            if _is_done(record, config):
                return 0
            if stop is not None:
                return _stopped(config, record, stop=stop, log=log)
            del run  # the larger model needs its memory
            resumable = _open_next_stage(config, mesh, log)
            if resumable is None:
                return EXIT_START_AGAIN
            run = resume.restore(resumable)
            _report_growth(config, run, context)


def _is_done(record: RunRecord, config: RunConfig) -> bool:
    return record.training.step == config.training.train_iters and not record.details.evaluation_due


def _open_next_stage(config: RunConfig, mesh: Mesh, log: MetricsLog) -> Resumable | None:
    """The checkpoint that the stage before has just written; None where the next one has another layout."""
    assert config.checkpoint.save is not None
    resumable = open_resumable(config, newest_checkpoint(config.checkpoint.save))
    if has_layout(config.at_stage(resumable.stage).parallel, mesh):
        return resumable
    step = resumable.record.training.step
    log.say(f"step {step:>6}  the next stage has another layout: start the same command again")
    return None


def _say_warnings(warnings: Iterable[str], changes: str, log: MetricsLog) -> None:
    for warning in warnings:
        log.say(f"warning: {warning}")
    if changes:
        log.say(changes)


def _report_start(config: RunConfig, run: RestoredRun, reporter: Reporter) -> None:
    _say_kernels(run.state.kernels, reporter.log.say)
    reporter.on_start(_stage(config, run), run.origin)
    if _is_done(run.record, config):
        steps = config.training.train_iters
        reporter.log.say(f"nothing is left to do: {run.origin} is at the last of {steps} steps (train_iters)")


def _report_growth(config: RunConfig, run: RestoredRun, context: RunContext) -> None:
    _say_kernels(run.state.kernels, context.say)
    stage = _stage(config, run)
    context.observers.tell(lambda observer: observer.on_growth(stage))


def _stage(config: RunConfig, run: RestoredRun) -> Stage:
    layout = {axis: run.state.mesh.size(axis) for axis in ("tp", "pp", "dp")}
    return Stage(config.at_stage(run.stage), run.record, layout)


def _saver(config: RunConfig, mesh: Mesh, *, log: MetricsLog, observers: Observers) -> BackgroundSaver:
    def on_saved(path: Path) -> None:
        observers.tell(lambda observer: observer.on_checkpoint(path))

    def on_failure(reason: str) -> None:
        log.say(f"warning: {reason}; training continues until the next save")

    limit = timedelta(seconds=config.parallel.distributed_timeout_seconds)
    return BackgroundSaver(mesh.new_world(limit), on_saved, on_failure)


def _open_loader(config: RunConfig, mesh: Mesh, *, record: RunRecord, tokenizer: Tokenizer) -> BatchLoader:
    """The batches that the run has not read yet."""
    dataset = build_dataset(config, blend_of(record))
    masking = DocumentMasking(tokenizer.eod, config.data.eod_mask_loss, config.data.reset_attention_mask)
    return build_loader(
        dataset,
        training=config.training,
        mesh=mesh,
        masking=masking,
        consumed_samples=record.training.samples,
    )


def _say_kernels(kernels: Kernels, say: Callable[[str], None]) -> None:
    if kernels.warning:
        say(f"warning: {kernels.warning}")
    if kernels.taken:
        say(f"kernels: auto took {kernels.taken}")


def _tokenizer(config: RunConfig) -> Tokenizer:
    data = config.data
    key = "tokenizer_model" if data.tokenizer_type in TYPES else "tokenizer_type"
    try:
        tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model, eod_token=data.eod_token)
    except (UserError, OSError) as error:
        raise ConfigError(f"data.{key}: {error}") from error
    check_tokenizer(config, tokenizer)
    return tokenizer


def _open_log(config: RunConfig, mesh: Mesh, step: int) -> MetricsLog:
    """Raises ConfigError on every rank where the first one can't open its sinks."""
    failure = None
    log = None
    try:
        log = MetricsLog(
            config.logging, first_step=step, train_iters=config.training.train_iters, enabled=mesh.is_first_rank
        )
    except (UserError, OSError) as error:
        failure = str(error)
    if reason := mesh.first_failure(failure):
        raise ConfigError(reason)
    assert log is not None
    return log


def _hold_lock(config: RunConfig, mesh: Mesh, stack: ExitStack, *, end: Callable[[str | None], None]) -> None:
    """Let no other run write into `checkpoint.save` until the stack is closed. Raises ConfigError on every rank."""
    refusal = None
    if mesh.is_first_rank and config.checkpoint.save is not None:
        try:
            stack.enter_context(RunLock(config.checkpoint.save, end))
        except LockedError as error:
            refusal = str(error)
        except OSError:
            pass  # the preflight says what is wrong with the directory, for every rank
    if reason := mesh.first_failure(refusal):
        raise ConfigError(reason)


def _check_stages(config: RunConfig, mesh: Mesh, first: int) -> None:
    """Raise ConfigError where a stage of growth to come has a layout or batches that do not fit these ranks."""
    for number in range(first, len(config.growth)):
        staged = config.at_stage(number + 1)
        parallel = staged.parallel
        pipeline = parallel.pipeline_model_parallel_size
        try:
            replicas = data_parallel_size(
                group_size(mesh.world),
                tensor=parallel.tensor_model_parallel_size,
                pipeline=pipeline,
                requested=parallel.data_parallel_size,
                shard_size=parallel.data_parallel_shard_size,
            )
            check_batch_sizes(staged, pipeline, replicas)
        except (ConfigError, LayoutError) as error:
            raise ConfigError(f"growth[{number}]: {error}") from None


def _stopped(config: RunConfig, record: RunRecord, *, stop: Stop, log: MetricsLog) -> int:
    """Say where the run stands; the exit code."""
    save = config.checkpoint.save
    saved = f"saved in {save}" if save else "not saved: no checkpoint.save"
    begin = f"step {record.training.step:>6}  stopped"
    if stop.is_final:  # done, as far as a launcher is concerned, which would start it again on 75
        log.say(f"{begin}: {stop.reason}, {saved}")
        return 0
    log.say(f"{begin} by {stop.reason}, {saved}: start the same command again")
    return exit_code(stop.number, is_saved=save is not None) if stop.number else EXIT_START_AGAIN
