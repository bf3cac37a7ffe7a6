"""Typed configuration: what a run is, checked before anything starts."""

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.growth import GrowthStage, grown_model, layer_origins, parse_token_option
from megatron_tf.config.load import load_config, parse_config, to_dict
from megatron_tf.config.model import TOKEN_KINDS, ModelConfig
from megatron_tf.config.optimizer import LossScaleConfig, OptimizerConfig
from megatron_tf.config.schema import (
    DATA_CONTENT,
    CheckpointConfig,
    DataConfig,
    KernelsConfig,
    LoggingConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_tf.config.types import ParameterKind

__all__ = [
    "DATA_CONTENT",
    "TOKEN_KINDS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "GrowthStage",
    "KernelsConfig",
    "LoggingConfig",
    "LossScaleConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterKind",
    "RunConfig",
    "TrainingConfig",
    "grown_model",
    "layer_origins",
    "load_config",
    "parse_config",
    "parse_token_option",
    "to_dict",
]
