"""What a model costs: parameters, and floating-point operations per token."""

from megatron_tf.config import TOKEN_KINDS, ModelConfig


def tokens_of_layer(config: ModelConfig, layer: int) -> int:
    """Parameter tokens of all Pattentions of one layer; a linear projection has the parameters of D / 2 of them."""
    if config.layer == "transformer":
        return 2 * config.hidden_size + config.token_counts("ffn")[layer]
    qkv, proj, ffn = (config.token_counts(kind)[layer] for kind in TOKEN_KINDS)
    return 3 * qkv + proj + ffn


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, padded vocabulary included."""
    tokens = sum(tokens_of_layer(config, layer) for layer in range(config.num_layers))
    vocabulary = config.padded_vocab_size * config.hidden_size
    copies = 2 if config.untie_embeddings_and_output_weights else 1
    return 2 * config.hidden_size * tokens + copies * vocabulary + 2 * config.hidden_size


def layer_flops(config: ModelConfig, layer: int, seq_length: int) -> int:
    """Forward operations per token of one layer: two products per parameter token, two per token attended to."""
    return 4 * config.hidden_size * tokens_of_layer(config, layer) + 4 * config.hidden_size * seq_length // 2


def head_flops(config: ModelConfig) -> int:
    """Forward operations per token of the output layer."""
    return 2 * config.hidden_size * config.padded_vocab_size


def training_flops(config: ModelConfig, seq_length: int) -> int:
    """Operations per token of forward and backward: three times the forward's."""
    return 3 * (sum(layer_flops(config, i, seq_length) for i in range(config.num_layers)) + head_flops(config))
