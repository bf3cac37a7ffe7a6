"""A training run from start to end: restore, train one stage after another, stop."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.commit import newest_checkpoint
from megatron_tf.checkpoint.lock import LockedError, RunLock
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.run_state import Identity
from megatron_tf.config import ConfigError, RunConfig
from megatron_tf.config.moment import never_due
from megatron_tf.data.batch import DocumentMasking
from megatron_tf.data.build import ValidationSet, build_dataset, build_loader, build_validation, check_tokenizer
from megatron_tf.data.loader import BatchLoader
from megatron_tf.data.packed_dataset import packing_reports
from megatron_tf.data.tokenizer import TYPES, Tokenizer, build_tokenizer
from megatron_tf.errors import UserError
from megatron_tf.failures import one_line_out_of_memory
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.parallel.collectives import group_rank, group_size
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.observability.metrics import MetricsLog
from megatron_tf.training.observability.observer import Observer, Observers, Stage
from megatron_tf.training.observability.profiling import Profiler
from megatron_tf.training.observability.reporter import Reporter
from megatron_tf.training.observability.step_timer import StepTimer
from megatron_tf.training.run.checkpointing import blend_of
from megatron_tf.training.run.context import RunContext
from megatron_tf.training.run.left_out import report_data
from megatron_tf.training.run.loop import Loop
from megatron_tf.training.run.resumable import Resumable, open_resumable
from megatron_tf.training.run.resume import RestoredRun, Resume, has_layout
from megatron_tf.training.run.stages import check_stages
from megatron_tf.training.step.state import build_state
from megatron_tf.training.supervision.preflight import preflight
from megatron_tf.training.supervision.signals import EXIT_START_AGAIN, SignalCatcher, exit_code
from megatron_tf.training.supervision.stop_signal import Stop, StopSignal
from megatron_tf.training.supervision.watchdog import Watchdog

_LESS_MEMORY = (
    "lower training.micro_batch_size, set training.recompute_granularity=full, or raise "
    "parallel.tensor_model_parallel_size"
)


def train(
    config: RunConfig,
    mesh: Mesh,
    *,
    signals: SignalCatcher,
    data: Mapping[str, Identity],
    end: Callable[[str | None], None],
    resumable: Resumable | None,
    observers: Sequence[Observer] = (),
) -> int:
    """Train for `train_iters` steps, through all stages of growth and of data; return the exit code. Collective.

    Stops early, after a save, on a signal, at the time limit, before a growth stage with another layout, or when one of
    `observers` asks for it. `data` are the identities of the training sets, `resumable` is the checkpoint that set the
    layout; `end` exits when ranks wait too long. Raises UserError, such as LostRankError and DivergedError.
    """
    timer = StepTimer()
    with ExitStack() as stack:
        signals.stop_at_next_step()
        stop_signal = StopSignal(mesh, signals, config.training.exit_duration_in_mins)
        stack.enter_context(_watchdog(config, mesh, timer=timer, end=end))
        # within the watchdog, which tells the other ranks the line that this one ends with
        stack.enter_context(one_line_out_of_memory(_LESS_MEMORY))
        _hold_lock(config, mesh, stack, end=end)
        tokenizer = _tokenizer(config)
        build = partial(build_state, mesh=mesh, timer=timer)
        resume = Resume(config, mesh, tokenizer=tokenizer.identity, build=build, data=data)
        run = resume.restore(resumable)
        check_stages(config, run)
        staged = run.config_in_force(config)
        warnings = [*run.damaged, *filter(None, [run.warning]), *preflight(staged, mesh), *_never_due(config)]
        log = stack.enter_context(_open_log(config, mesh, run.record.training.step))
        _say_warnings(warnings, run.changes, log)
        reporter = Reporter(log, config=config, mesh=mesh, timer=timer)
        everyone = Observers([reporter, Profiler(config.logging, mesh, reporter.on_profile), *observers])
        context = RunContext(
            saver=stack.enter_context(_saver(config, mesh, log=log, observers=everyone)),
            loader=_open_loader(staged, mesh, record=run.record, tokenizer=tokenizer),
            validation=_open_validation(staged),
            stop_signal=stop_signal,
            timer=timer,
            observers=everyone,
            say=log.say,
            is_logged=log.is_interval,
        )
        _report_start(config, run, reporter, context=context)
        while True:
            record, stop = _run_stage(config, run, context=context, resume=resume)
            if _is_done(record, config):
                return 0
            if stop is not None:
                return _stopped(config, record, stop=stop, log=log)
            del run  # the next model needs its memory
            resumable = _open_next_stage(config, mesh, log)
            if resumable is None:
                return EXIT_START_AGAIN
            run = resume.restore(resumable)
            context = _in_stage(context, run.config_in_force(config), run.record, mesh=mesh, tokenizer=tokenizer)
            if resumable.stage > resumable.saved_stage:
                _report_growth(config, run, context)


def _run_stage(
    config: RunConfig, run: RestoredRun, *, context: RunContext, resume: Resume
) -> tuple[RunRecord, Stop | None]:
    """Train to the end of a stage or of the run; return its record, and why the run stops, if it does."""
    training = run.config_in_force(config).training
    with context.loader:
        if run.has_new_data:
            report_data(context.observers, run.record, training, reason="phase")
        record, stop = Loop(config, run, context=context, reload=resume.reload_into).run()
    if _is_done(record, config):
        report_data(context.observers, record, training, reason="end")
    return record, stop


def _in_stage(
    context: RunContext, staged: RunConfig, record: RunRecord, *, mesh: Mesh, tokenizer: Tokenizer
) -> RunContext:
    """Return the context of the next stage, which may have other data, sequence lengths and batch sizes."""
    loader = _open_loader(staged, mesh, record=record, tokenizer=tokenizer)
    return replace(context, loader=loader, validation=_open_validation(staged))


def _open_validation(staged: RunConfig) -> Sequence[ValidationSet]:
    return build_validation(staged) if staged.training.eval_interval else []


def _watchdog(config: RunConfig, mesh: Mesh, *, timer: StepTimer, end: Callable[[str | None], None]) -> Watchdog:
    return Watchdog(
        mesh.store,
        rank=group_rank(mesh.world),
        size=group_size(mesh.world),
        now=timer.now,
        limit_seconds=config.parallel.distributed_timeout_seconds,
        end=end,
    )


def _is_done(record: RunRecord, config: RunConfig) -> bool:
    return record.training.step == config.training.train_iters and not record.details.evaluation_due


def _open_next_stage(config: RunConfig, mesh: Mesh, log: MetricsLog) -> Resumable | None:
    """Open the checkpoint that the previous stage has just written; None if the next stage has another layout."""
    assert config.checkpoint.save is not None
    resumable = open_resumable(config, newest_checkpoint(config.checkpoint.save))
    if has_layout(resumable.config_from_here(config).parallel, mesh):
        return resumable
    step = resumable.record.training.step
    log.say(f"step {step:>6}  the next stage has another layout: start the same command again")
    return None


def _never_due(config: RunConfig) -> Iterator[str]:
    steps = config.training.train_iters
    yield from never_due("growth", config.growth, steps)
    yield from never_due("data.phases", config.data.phases, steps)


def _say_warnings(warnings: Iterable[str], changes: str, log: MetricsLog) -> None:
    for warning in warnings:
        log.say(f"warning: {warning}")
    if changes:
        log.say(changes)


def _report_start(config: RunConfig, run: RestoredRun, reporter: Reporter, *, context: RunContext) -> None:
    _say_kernels(run.state.kernels, reporter.log.say)
    reporter.on_start(_stage(config, run), run.origin)
    _say_advice(run, reporter.log.say)
    if run.state.mesh.is_first_rank:
        for report in packing_reports(context.loader.dataset):
            reporter.log.say(f"packing: {report}")
    if _is_done(run.record, config):
        steps = config.training.train_iters
        reporter.log.say(f"nothing is left to do: {run.origin} is at the last of {steps} steps (train_iters)")


def _report_growth(config: RunConfig, run: RestoredRun, context: RunContext) -> None:
    _say_kernels(run.state.kernels, context.say)
    stage = _stage(config, run)
    context.observers.tell(lambda observer: observer.on_growth(stage))
    _say_advice(run, context.say)


def _say_advice(run: RestoredRun, say: Callable[[str], None]) -> None:
    for line in run.advice:
        say(line)


def _stage(config: RunConfig, run: RestoredRun) -> Stage:
    mesh = run.state.mesh
    layout = {axis: mesh.size(axis) for axis in ("tp", "pp", "dp")}
    if mesh.size("cp") > 1:
        layout["cp"] = mesh.size("cp")
    return Stage(run.config_in_force(config), run.record, layout)


def _saver(config: RunConfig, mesh: Mesh, *, log: MetricsLog, observers: Observers) -> BackgroundSaver:
    def on_saved(path: Path) -> None:
        observers.tell(lambda observer: observer.on_checkpoint(path))

    def on_failure(reason: str) -> None:
        log.say(f"warning: {reason}; training continues until the next save")

    limit = timedelta(seconds=config.parallel.distributed_timeout_seconds)
    return BackgroundSaver(mesh.new_world(limit), on_saved, on_failure)


def _open_loader(config: RunConfig, mesh: Mesh, *, record: RunRecord, tokenizer: Tokenizer) -> BatchLoader:
    """Build the loader of the batches that the run has not read yet."""
    dataset = build_dataset(config, blend_of(record), record.details.phase)
    masking = DocumentMasking(tokenizer.eod, config.data.eod_mask_loss, config.data.reset_attention_mask)
    return build_loader(
        dataset,
        training=config.training,
        mesh=mesh,
        masking=masking,
        consumed_samples=record.training.samples,
    )


def _say_kernels(kernels: Kernels, say: Callable[[str], None]) -> None:
    for warning in filter(None, (kernels.warning, kernels.not_in_fp8)):
        say(f"warning: {warning}")
    if kernels.taken:
        say(f"kernels: auto selected {kernels.taken}")


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
    """Open the log. Raises ConfigError on every rank if rank 0 can't open its sinks. Collective."""
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
    """Lock `checkpoint.save` until the stack is closed. Raises ConfigError on every rank if another run holds it."""
    refusal = None
    if mesh.is_first_rank and config.checkpoint.save is not None:
        try:
            stack.enter_context(RunLock(config.checkpoint.save, end))
        except LockedError as error:
            refusal = str(error)
        except OSError:
            pass  # the preflight reports on the directory for every rank
    if reason := mesh.first_failure(refusal):
        raise ConfigError(reason)


def _stopped(config: RunConfig, record: RunRecord, *, stop: Stop, log: MetricsLog) -> int:
    """Report where and why the run stops; return the exit code."""
    save = config.checkpoint.save
    saved = f"saved in {save}" if save else "not saved: no checkpoint.save"
    prefix = f"step {record.training.step:>6}  stopped"
    if stop.is_final:  # exit code 0, as a launcher would restart the run on 75
        log.say(f"{prefix}: {stop.reason}, {saved}")
        return 0
    log.say(f"{prefix} by {stop.reason}, {saved}: start the same command again")
    return exit_code(stop.number, is_saved=save is not None) if stop.number else EXIT_START_AGAIN
