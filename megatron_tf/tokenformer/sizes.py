"""What a model costs, as sums over its parameters: their number, and floating-point operations per token."""

import math
from collections.abc import Iterable

from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.parameters import Parameter, layer_parameters, model_parameters


def parameter_count(config: ModelConfig) -> int:
    """Count the parameters of the whole model, padded vocabulary included."""
    return _total(model_parameters(config).values())


def layer_flops(config: ModelConfig, layer: int, seq_length: int) -> int:
    """Count forward operations per token of one layer.

    A product and a sum for each of its parameters, and two products of the hidden width for each token that is attended
    to: half of the sequence, since attention is causal.
    """
    return 2 * _total(layer_parameters(config, layer)) + 4 * config.hidden_size * seq_length // 2


def head_flops(config: ModelConfig) -> int:
    """Count forward operations per token of the output layer."""
    return 2 * config.hidden_size * config.padded_vocab_size


def training_flops(config: ModelConfig, seq_length: int) -> int:
    """Count operations per token of forward and backward: three times the forward's."""
    return 3 * (sum(layer_flops(config, i, seq_length) for i in range(config.num_layers)) + head_flops(config))


def _total(parameters: Iterable[Parameter]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)
