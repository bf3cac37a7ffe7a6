"""Check that batches divide into micro-batches on a layout."""

from megatron_tf.config import ConfigError, RunConfig
from megatron_tf.parallel.schedules import needed_micro_batches


def check_batch_sizes(config: RunConfig, ranks: int, replicas: int) -> None:
    """Check every batch size of a run against the micro-batch size, the data-parallel size and the schedule over the
    pipeline ranks.

    Raises ConfigError, with the numbers, if a batch does not divide into micro-batches on every replica, or gives a
    number of them that the schedule can't run.
    """
    training = config.training
    for size in training.batch_sizes:
        is_full = size == training.global_batch_size
        key = "training.global_batch_size" if is_full else "a batch of training.rampup_batch_size"
        count, rest = divmod(size, training.micro_batch_size * replicas)
        if rest:
            raise ConfigError(
                f"{key} ({size}) must be divisible by "
                f"training.micro_batch_size ({training.micro_batch_size}) x data-parallel size ({replicas})"
            )
        schedule = config.parallel.pipeline_schedule
        needed = needed_micro_batches(schedule, count, ranks) if ranks > 1 else None
        if needed is not None:
            raise ConfigError(
                f"the {schedule} schedule over {ranks} pipeline ranks needs {needed} micro-batches, {key} ({size}) "
                f"gives {count} on each of {replicas} replicas: change it or micro_batch_size, or choose gpipe"
            )
