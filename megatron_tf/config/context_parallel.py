"""Checks that a model and its sequences can be split over context-parallel ranks."""

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.model import ModelConfig
from megatron_tf.config.parallel import ParallelConfig
from megatron_tf.config.training import TrainingConfig


def check_context_parallel(
    parallel: ParallelConfig, model: ModelConfig, training: TrainingConfig, *, attention: str
) -> None:
    """Raise ConfigError, with the numbers, for what context parallelism can't split or compute; `attention` is the
    configured kernel."""
    if parallel.context_parallel_size == 1:
        return
    _check_length(parallel, training.seq_length)
    if parallel.context_parallel_method == "all_to_all":
        _check_heads(parallel, model.num_attention_heads)
    elif attention not in ("auto", "sdpa"):
        raise ConfigError(
            f"parallel.context_parallel_method ring needs kernels.attention sdpa, but it is {attention}: change it, or "
            f"choose all_to_all"
        )
    if training.attention_dropout:
        raise ConfigError(
            f"training.attention_dropout ({training.attention_dropout}) needs parallel.context_parallel_size 1, but it "
            f"is {parallel.context_parallel_size}: set attention_dropout to 0; hidden_dropout works"
        )


def _check_length(parallel: ParallelConfig, length: int) -> None:
    size, chunks = parallel.context_parallel_size, parallel.num_chunks
    if length % chunks:
        raise ConfigError(
            f"training.seq_length ({length}) must be divisible by {chunks}, the number of chunks for "
            f"parallel.context_parallel_size ({size}) under context_parallel_method {parallel.context_parallel_method}"
        )
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and length % (size * tensor):
        raise ConfigError(
            f"training.seq_length ({length}) must be divisible by parallel.context_parallel_size ({size}) x "
            f"parallel.tensor_model_parallel_size ({tensor}) under sequence_parallel"
        )


def _check_heads(parallel: ParallelConfig, num_heads: int) -> None:
    size, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if num_heads % (size * tensor):
        raise ConfigError(
            f"model.num_attention_heads ({num_heads}) must be divisible by parallel.context_parallel_size ({size}) x "
            f"parallel.tensor_model_parallel_size ({tensor}) under context_parallel_method all_to_all: choose ring"
        )
