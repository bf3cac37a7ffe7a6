"""Typed configuration: what a run is, checked before anything starts."""

from megatron_tf.config.load import ConfigError, describe, load_config, parse_config, to_dict
from megatron_tf.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainingConfig",
    "describe",
    "load_config",
    "parse_config",
    "to_dict",
]
