"""Check that batches divide into micro-batches on a layout."""

from megatron_tf.config import ConfigError, RunConfig


def check_batch_sizes(config: RunConfig, stages: int, replicas: int) -> None:
    """Check every batch size of a run against the micro-batch size, the data-parallel size and the pipeline schedule.

    Raises ConfigError, with the numbers, if a batch does not divide into micro-batches on every replica, or gives too
    few of them for the schedule.
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
        if config.parallel.pipeline_schedule == "1f1b" and stages > 1 and count < stages:
            raise ConfigError(
                f"the 1f1b schedule over {stages} stages needs at least as many micro-batches, {key} ({size}) "
                f"gives {count} on each of {replicas} replicas: raise it, lower micro_batch_size, or choose gpipe"
            )
