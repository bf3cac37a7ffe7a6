"""What a model costs: parameters, and floating-point operations per token."""

from megatron_tf.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, padded vocabulary included."""
    tokens = 3 * config.qkv_tokens + config.proj_tokens + config.ffn_tokens
    vocabulary = config.padded_vocab_size * config.hidden_size
    copies = 2 if config.untie_embeddings_and_output_weights else 1
    return config.num_layers * 2 * config.hidden_size * tokens + copies * vocabulary + 2 * config.hidden_size


def layer_flops(config: ModelConfig, seq_length: int) -> int:
    """Forward operations per token of one layer: two products per parameter token, two per token attended to."""
    tokens = 3 * config.qkv_tokens + config.proj_tokens + config.ffn_tokens
    return 4 * config.hidden_size * tokens + 4 * config.hidden_size * seq_length // 2


def head_flops(config: ModelConfig) -> int:
    """Forward operations per token of the output layer."""
    return 2 * config.hidden_size * config.padded_vocab_size


def training_flops(config: ModelConfig, seq_length: int) -> int:
    """Operations per token of forward and backward: three times the forward's."""
    return 3 * (config.num_layers * layer_flops(config, seq_length) + head_flops(config))
