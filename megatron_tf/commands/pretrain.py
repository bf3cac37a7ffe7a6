"""Train: `python -m megatron_tf.pretrain CONFIG.yaml [--section.key=value ...]`, alone or by torchrun or srun."""

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from megatron_tf.commands.arguments import file_path, make_parser
from megatron_tf.commands.runner import command, say_error
from megatron_tf.config import RunConfig, load_config
from megatron_tf.config.describe import describe_keys
from megatron_tf.training.supervision.signals import SignalCatcher, caught_signals, exit_code

if TYPE_CHECKING:
    from megatron_tf.training.observability.observer import Observer

_MARGIN = timedelta(seconds=30)  # that collectives wait longer than the watchdog, which has more to say


@command(interrupted="interrupted: the same command resumes from the newest checkpoint in checkpoint.save")
def main(arguments: list[str] | None = None, *, observers: "Sequence[Observer]" = ()) -> int:
    """Train, and tell `observers` of each step, evaluation, checkpoint and growth.

    Returns 0 when the run is done, by its configuration or as an observer says, 75 where it is saved and the same
    command continues it, 128 + the number of a signal where it is not saved.
    """
    parser = make_parser("pretrain", __doc__, "Keys of the configuration, each also an override:\n" + describe_keys())
    parser.add_argument("config", type=file_path, help="YAML file; examples/configs holds some")
    known, overrides = parser.parse_known_args(arguments)
    with caught_signals() as signals:
        return run(load_config(known.config, overrides), signals, observers)


def _abort(reason: str | None) -> None:
    """End this process although its main thread waits."""
    say_error(reason or "")
    os._exit(1)


def run(config: RunConfig, signals: SignalCatcher, observers: "Sequence[Observer]" = ()) -> int:
    """Join the other ranks and train; returns the exit code."""
    signals.end_at_once(partial(exit_code, is_saved=config.checkpoint.save is not None))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # our errors say in a line what its warnings say in forty
    # after the configuration has been checked: it takes seconds
    from megatron_tf.kernels.build_failure import make_compiler_cache

    make_compiler_cache()  # the imports below raise a bare OSError without it
    from megatron_tf.parallel.mesh import init_mesh
    from megatron_tf.training.run.identity import check_same_run, data_identities
    from megatron_tf.training.run.resume import open_newest
    from megatron_tf.training.run.trainer import train
    from megatron_tf.training.step.determinism import use_deterministic_algorithms

    if config.training.deterministic:
        use_deterministic_algorithms()
    data = data_identities(config)
    resumable = open_newest(config)
    parallel = config.at_stage(resumable.stage if resumable else 0).parallel
    limit = timedelta(seconds=parallel.distributed_timeout_seconds)
    mesh = init_mesh(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        data=parallel.data_parallel_size,
        timeout=limit + _MARGIN,
        shard_size=parallel.data_parallel_shard_size,
        limit=limit,
        check=partial(check_same_run, config=config, data=data),
    )
    return train(config, mesh, signals=signals, data=data, end=_abort, resumable=resumable, observers=observers)
