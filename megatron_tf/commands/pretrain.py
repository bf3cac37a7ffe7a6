"""Train a model from a YAML configuration: one rank, or several under torchrun, srun or mpiexec.

If checkpoint.save contains a checkpoint, the run resumes from the newest one.
Exit code: 0 completed; 1 user error; 75 state saved, run the same command again; 128 + N ended by signal N.

Examples:
    megatron-tf pretrain run.yaml --training.train_iters=1000 --checkpoint.save=runs/small
    megatron-tf torchrun --nproc-per-node 8 -m megatron_tf.pretrain run.yaml
"""

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from megatron_tf.commands.arguments import file_path, make_parser
from megatron_tf.commands.runner import command, import_late, say_error
from megatron_tf.config import RunConfig, load_config
from megatron_tf.config.describe import describe_keys
from megatron_tf.training.supervision.signals import SignalCatcher, exit_code

if TYPE_CHECKING:
    from megatron_tf.training.observability.observer import Observer

_MARGIN = timedelta(seconds=30)  # collectives wait this much longer than the watchdog, whose message is more helpful


@command(interrupted="interrupted: the same command resumes from the newest checkpoint in checkpoint.save")
def main(
    arguments: list[str] | None = None,
    *,
    signals: SignalCatcher | None = None,
    observers: "Sequence[Observer]" = (),
) -> int:
    """Train, and notify `observers` of each step, evaluation, checkpoint and growth.

    `signals` is entered already; by default signals are caught from here on.

    Returns 0 if the run is complete or an observer ended it, 75 if it was saved and the same command resumes it, and
    128 + the signal's number if a signal ended it without saving.
    """
    parser = make_parser("pretrain", __doc__, "Keys of the configuration, each also an override:\n" + describe_keys())
    parser.add_argument(
        "config",
        type=file_path,
        help="YAML configuration, such as those in examples/configs, followed by overrides --section.key=value",
    )
    known, overrides = parser.parse_known_args(arguments)
    with SignalCatcher() if signals is None else contextlib.nullcontext(signals) as caught:
        return run(load_config(known.config, overrides), caught, observers)


def _abort(reason: str | None) -> None:
    """End this process even though its main thread is blocked."""
    say_error(reason or "")
    os._exit(1)


def run(config: RunConfig, signals: SignalCatcher, observers: "Sequence[Observer]" = ()) -> int:
    """Initialize the process group and train; return the exit code."""
    signals.end_at_once(partial(exit_code, is_saved=config.checkpoint.save is not None))
    # our own error says in one line what these warnings say in forty
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # after the configuration has been validated, since this takes seconds
    import_late("megatron_tf.kernels.build_failure")
    from megatron_tf.kernels.build_failure import make_compiler_cache

    make_compiler_cache()  # the imports below raise a bare OSError without it
    import_late("megatron_tf.training.run.trainer")
    from megatron_tf.parallel.mesh import init_mesh
    from megatron_tf.training.run.identity import check_same_run, data_identities
    from megatron_tf.training.run.resumable import in_order_of
    from megatron_tf.training.run.resume import open_newest
    from megatron_tf.training.run.trainer import train
    from megatron_tf.training.step.determinism import use_deterministic_algorithms

    if config.training.deterministic:
        use_deterministic_algorithms()
    data = data_identities(config)
    resumable = open_newest(config)
    config = in_order_of(resumable, config)
    parallel = (resumable.config_from_here(config) if resumable else config.at_stage(0)).parallel
    limit = timedelta(seconds=parallel.distributed_timeout_seconds)
    mesh = init_mesh(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        data=parallel.data_parallel_size,
        context=parallel.context_parallel_size,
        timeout=limit + _MARGIN,
        shard_size=parallel.data_parallel_shard_size,
        limit=limit,
        check=partial(check_same_run, config=config, data=data),
    )
    return train(config, mesh, signals=signals, data=data, end=_abort, resumable=resumable, observers=observers)
