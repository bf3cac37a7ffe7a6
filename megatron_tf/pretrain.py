"""Train: `python -m megatron_tf.pretrain CONFIG.yaml [--section.key=value ...]`, alone or by torchrun or srun."""

# signals are caught before the imports below, which take half a minute on some file systems

from megatron_tf.arguments import file_path
from megatron_tf.parallel.signals import (
    EXIT_START_AGAIN,
    SignalCatcher,
    catch_from_first_line,
    caught_signals,
    exit_code,
)

if __name__ == "__main__":
    catch_from_first_line()

import argparse
import os
import sys
from datetime import timedelta
from functools import partial

from megatron_tf.config import RunConfig, describe, load_config

__all__ = ["EXIT_START_AGAIN", "main", "run"]

_MARGIN = timedelta(seconds=30)  # that collectives wait longer than the watch, which has more to say


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the run: 0 when it is done, 1 after an error a user can fix, 75 where it is saved and the same
    command is to be started again, 130 after Ctrl-C, 128 + the number of another signal where it is not saved."""
    parser = argparse.ArgumentParser(
        prog="megatron_tf.pretrain",
        description=__doc__,
        epilog="Keys of the configuration, each also an override:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=file_path, help="YAML file; examples/configs holds some")
    known, overrides = parser.parse_known_args(arguments)
    try:
        with caught_signals() as signals:
            return run(load_config(known.config, overrides), signals)
    except (ValueError, OSError, ArithmeticError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on from the newest checkpoint in checkpoint.save")
        return 130  # as shells count SIGINT


def _say(message: str) -> None:
    rank = os.environ.get("RANK")
    where = "" if rank is None else f"[rank {rank}] "
    sys.stderr.write(f"{where}{message}\n")  # at once: lines of several ranks are not to mix
    sys.stderr.flush()


def _end(reason: str | None) -> None:
    """End this process although its main thread waits."""
    if reason is not None:
        _say(f"error: {reason}")
    os._exit(1)


def run(config: RunConfig, signals: SignalCatcher) -> int:
    """Join the other ranks and train; returns the exit code."""
    signals.end_at_once(partial(exit_code, is_saved=config.checkpoint.save is not None))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # our errors say in a line what its warnings say in forty
    # after the configuration is known to be sound: it takes seconds
    from megatron_tf.kernels.build_failure import make_compiler_cache

    make_compiler_cache()  # the imports below raise a bare OSError without it
    from megatron_tf.parallel.mesh import init_mesh
    from megatron_tf.training.determinism import use_deterministic_algorithms
    from megatron_tf.training.identity import check_same_run, data_identities
    from megatron_tf.training.resume import open_newest
    from megatron_tf.training.trainer import train

    if config.training.deterministic:
        use_deterministic_algorithms()
    data = data_identities(config)
    resumable = open_newest(config)
    parallel = config.at_stage(resumable.stage if resumable else 0).parallel
    limit = timedelta(seconds=parallel.distributed_timeout_seconds)
    mesh = init_mesh(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_size,
        limit + _MARGIN,
        parallel.data_parallel_shard_size,
        limit=limit,
        check=partial(check_same_run, config, data),
    )
    return train(config, mesh, signals=signals, data=data, end=_end, resumable=resumable)


if __name__ == "__main__":
    sys.exit(main())
