"""Train: `python -m megatron_tf.pretrain CONFIG.yaml [--section.key=value ...]`, alone or by torchrun or srun."""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

from megatron_tf.config import RunConfig, describe, load_config
from megatron_tf.parallel.mesh import init_mesh


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the run: 0 when it is done, 1 after an error a user can mend."""
    parser = argparse.ArgumentParser(
        prog="megatron_tf.pretrain",
        description=__doc__,
        epilog="Keys of the configuration, each also an override:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file; examples/configs holds some")
    known, overrides = parser.parse_known_args(arguments)
    try:
        run(load_config(known.config, overrides))
    except (ValueError, OSError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on from the newest checkpoint in checkpoint.save")
        return 130  # as shells count SIGINT
    return 0


def _say(message: str) -> None:
    rank = os.environ.get("RANK")
    where = "" if rank is None else f"[rank {rank}] "
    print(f"{where}{message}", file=sys.stderr, flush=True)


def run(config: RunConfig) -> None:
    """Join the other ranks and train."""
    from megatron_tf.training.trainer import (
        train,
    )  # after the configuration is known to be sound: it takes seconds

    parallel = config.parallel
    mesh = init_mesh(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_size,
        timedelta(seconds=parallel.distributed_timeout_seconds),
    )
    train(config, mesh)


if __name__ == "__main__":
    sys.exit(main())
