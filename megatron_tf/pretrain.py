"""Train: `python -m megatron_tf.pretrain CONFIG.yaml [--section.key=value ...]`, alone or by torchrun or srun."""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

from megatron_tf.config import RunConfig, describe, load_config
from megatron_tf.parallel.mesh import init_mesh

EXIT_START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
_MARGIN = timedelta(seconds=30)  # that collectives wait longer than the watch, which has more to say


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the run: 0 when it is done, 1 after an error a user can mend, 75 where it is saved and the same
    command is to be started again."""
    parser = argparse.ArgumentParser(
        prog="megatron_tf.pretrain",
        description=__doc__,
        epilog="Keys of the configuration, each also an override:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file; examples/configs holds some")
    known, overrides = parser.parse_known_args(arguments)
    try:
        return run(load_config(known.config, overrides))
    except (ValueError, OSError, ArithmeticError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on from the newest checkpoint in checkpoint.save")
        return 130  # as shells count SIGINT


def _say(message: str) -> None:
    rank = os.environ.get("RANK")
    where = "" if rank is None else f"[rank {rank}] "
    print(f"{where}{message}", file=sys.stderr, flush=True)


def _end(reason: str | None) -> None:
    """End this process although its main thread waits."""
    if reason is not None:
        _say(f"error: {reason}")
    os._exit(1)


def run(config: RunConfig) -> int:
    """Join the other ranks and train; returns the exit code."""
    # after the configuration is known to be sound: it takes seconds
    from megatron_tf.kernels.build_failure import make_compiler_cache

    make_compiler_cache()  # the imports below raise a bare OSError without it
    from megatron_tf.training.determinism import use_deterministic_algorithms
    from megatron_tf.training.resume import first_stage
    from megatron_tf.training.trainer import train

    if config.training.deterministic:
        use_deterministic_algorithms()
    parallel = config.at_stage(first_stage(config)).parallel
    mesh = init_mesh(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_size,
        timedelta(seconds=parallel.distributed_timeout_seconds) + _MARGIN,
        parallel.data_parallel_shard_size,
    )
    progress = train(config, mesh, _end)
    return 0 if progress.step >= config.training.train_iters else EXIT_START_AGAIN


if __name__ == "__main__":
    sys.exit(main())
