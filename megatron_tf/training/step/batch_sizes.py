"""Whether batches split into micro-batches on a layout."""

from megatron_tf.config import ConfigError, RunConfig


def check_batch_sizes(config: RunConfig, stages: int, replicas: int) -> None:
    """Raise ConfigError, with the numbers, where a batch does not split into micro-batches of every replica, or into
    too few of them for the pipeline's schedule."""
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
