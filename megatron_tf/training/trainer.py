"""A run from its start to its end: restore, train stage after stage of growth, stop."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.config import RunConfig, to_dict
from megatron_tf.data.tokenizer import build_tokenizer
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.model.sizes import parameter_count
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.watch import Watch
from megatron_tf.training.checkpointing import Progress, stage_reached
from megatron_tf.training.datasets import build_dataset, build_loader, build_validation, check_tokenizer
from megatron_tf.training.loop import Loop, Tools
from megatron_tf.training.metrics import MetricsLog
from megatron_tf.training.phases import Phases
from megatron_tf.training.preflight import preflight
from megatron_tf.training.profiling import Profiler
from megatron_tf.training.resume import begin, has_layout
from megatron_tf.training.state import TrainState, build_state
from megatron_tf.training.stopping import Stopping


def train(config: RunConfig, mesh: Mesh, end: Callable[[str | None], None]) -> Progress:
    """Run until `train_iters` steps are done, growing on the way where the configuration says so; on every rank.

    Ends before, with all saved, on SIGTERM, on SIGUSR1, when its time is up, and where a stage of growth has another
    layout: the run is then to be started again. `end` ends the process when ranks wait for each other too long, with
    the reason. Raises ValueError (ConfigError, DataError, CheckpointError among them) for what a user can mend,
    ConnectionError where a rank is lost, ArithmeticError where the model does not train any more.
    """
    began = time.monotonic()
    phases = Phases()
    training, limit = config.training, config.parallel.distributed_timeout_seconds
    with ExitStack() as open_:
        # handles SIGTERM until the last, as launchers send it to the ranks that are left when one is lost
        stopping = open_.enter_context(Stopping(mesh, training.exit_duration_in_mins, began))
        open_.enter_context(Watch(mesh.store, phases.now, limit, end))
        data = config.data
        tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model, eod_token=data.eod_token)
        check_tokenizer(config, tokenizer)

        def build(staged: RunConfig) -> TrainState:
            return build_state(staged, mesh, tokenizer.eod, phases)

        begun = begin(config, mesh, tokenizer.identity, build)
        progress = begun.progress
        validation = build_validation(config) if training.eval_interval else []
        warnings = preflight(config.at_stage(begun.stage), mesh)
        log = open_.enter_context(MetricsLog(config.logging, progress.step, training.train_iters, mesh.is_first_rank))
        for warning in (*begun.damaged, *warnings):
            log.say(f"warning: {warning}")
        saver = open_.enter_context(
            BackgroundSaver(
                mesh.new_world(timedelta(seconds=limit)),
                lambda path: log.say(f"saved {path}"),
                lambda reason: log.say(f"warning: {reason}; training goes on until the next save"),
            )
        )
        loader = open_.enter_context(build_loader(build_dataset(config), training, mesh, progress.samples))
        tools = Tools(loader, validation, log, saver, stopping, phases, Profiler(config.logging, mesh), began)
        _say_kernels(begun.state.kernels, log)
        _announce("start", config.at_stage(begun.stage), mesh, progress, log, begun.origin)
        while True:
            loop = Loop(config, begun, tools, lambda state: begin(config, mesh, tokenizer.identity, lambda _: state))
            progress = loop.run()
            if progress.step == training.train_iters:
                return progress
            if stopping.reason:
                _say_stopped(config, progress, stopping, log)
                return progress
            del loop, begun  # the larger model needs their memory
            assert config.checkpoint.save is not None
            if not has_layout(config.at_stage(stage_reached(config, config.checkpoint.save)).parallel, mesh):
                log.say(f"step {progress.step:>6}  the next stage has another layout: start the same command again")
                return progress
            begun = begin(config, mesh, tokenizer.identity, build)
            _say_kernels(begun.state.kernels, log)
            _announce("growth", config.at_stage(begun.stage), mesh, begun.progress, log, config.checkpoint.save)


def _say_kernels(kernels: Kernels, log: MetricsLog) -> None:
    if kernels.warning:
        log.say(f"warning: {kernels.warning}")
    if kernels.taken:
        log.say(f"kernels: auto took {kernels.taken}")


def _say_stopped(config: RunConfig, progress: Progress, stopping: Stopping, log: MetricsLog) -> None:
    saved = f"saved in {config.checkpoint.save}" if config.checkpoint.save else "not saved: no checkpoint.save"
    log.say(f"step {progress.step:>6}  stopped by {stopping.reason}, {saved}: start the same command again")


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
            "flops": progress.flops,
            "device_hours": progress.device_seconds / 3600,
            "parameters": parameters,
            "layout": layout,
            "lineage": list(progress.lineage),
            "config": to_dict(config),
        }
    )
    places = " x ".join(f"{axis} {size}" for axis, size in layout.items())
    if event == "growth":
        log.say(f"step {progress.step:>6}  grown to {parameters:,} parameters")
    else:
        where = f"going on from {origin} at step {progress.step}" if origin else "a new run"
        log.say(f"{parameters:,} parameters on {places} ({mesh.device.type}); {where}")
