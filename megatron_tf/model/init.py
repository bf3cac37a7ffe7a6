"""Initial values: a function of a parameter's name and the seed, never of the parallel layout."""

import math
from collections.abc import Iterable

import torch

from megatron_tf.config import ModelConfig
from megatron_tf.parallel.sharding import RowShard, copy_rows
from megatron_tf.tokenformer.initial_values import normal_rows, value_token_std


def initialize(shards: Iterable[RowShard], config: ModelConfig, seed: int) -> None:
    """Fill this rank's rows of every parameter."""
    for shard in shards:
        if shard.name == "final_norm.weight":
            shard.tensor.fill_(1.0)
        elif shard.name == "final_norm.bias":
            shard.tensor.zero_()
        else:
            is_value = shard.name.endswith(("value_tokens", "proj.weight", "ffn.down.weight"))
            std = value_token_std(config.num_layers, config.hidden_size) if is_value else config.init_method_std
            columns = math.prod(shard.global_shape[1:])
            with torch.no_grad():
                copy_rows(shard, normal_rows(shard.name, seed, shard.start, shard.stop, columns, std))
