"""Parameter counts and floating-point operations (FLOPs) per token, as sums over a model's parameters."""

import math
from collections.abc import Iterable

from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.parameters import Parameter, layer_parameters, model_parameters


def parameter_count(config: ModelConfig) -> int:
    """Count the parameters of the whole model, including vocabulary padding."""
    return _total(model_parameters(config).values())


def layer_flops(config: ModelConfig, layer: int, seq_length: int) -> int:
    """Count forward FLOPs per token of one layer.

    Each weight of a matrix takes a multiplication and an addition; norms are not counted. Each attended token takes two
    dot products of the hidden size. Attention is causal, so a token attends to half of the sequence on average.
    """
    matrices = [parameter for parameter in layer_parameters(config, layer) if len(parameter.shape) > 1]
    return 2 * _total(matrices) + 4 * config.hidden_size * seq_length // 2


def head_flops(config: ModelConfig) -> int:
    """Count forward FLOPs per token of the output layer."""
    return 2 * config.hidden_size * config.padded_vocab_size


def training_flops(config: ModelConfig, seq_length: int) -> int:
    """Count FLOPs per token of forward and backward: three times those of forward."""
    return 3 * (sum(layer_flops(config, i, seq_length) for i in range(config.num_layers)) + head_flops(config))


def _total(parameters: Iterable[Parameter]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)
