"""Typed configuration of a run, validated before anything starts."""

from megatron_tf.config.data_phases import DataPhase
from megatron_tf.config.data_values import parse_data_path, parse_split
from megatron_tf.config.errors import ConfigError
from megatron_tf.config.grown_model import (
    LayerSource,
    grown_model,
    keeps_outputs,
    layer_sources,
    token_init,
    widened_model,
)
from megatron_tf.config.growth import LAYOUT_KEYS, UNEVEN_MULTIPLE, GrowthStage, TokenInit, parse_token_option
from megatron_tf.config.load import load_config, parse_config, to_dict
from megatron_tf.config.model import TOKEN_KINDS, ModelConfig
from megatron_tf.config.optimizer import LossScaleConfig, OptimizerConfig, ScheduleConfig
from megatron_tf.config.parallel import ContextParallelMethod, ParallelConfig, PipelineSchedule
from megatron_tf.config.schema import (
    ANY_DATA,
    DATA_CONTENT,
    CheckpointConfig,
    DataConfig,
    KernelsConfig,
    LoggingConfig,
    RunConfig,
)
from megatron_tf.config.training import TrainingConfig
from megatron_tf.config.types import ParameterKind

__all__ = [
    "ANY_DATA",
    "DATA_CONTENT",
    "LAYOUT_KEYS",
    "TOKEN_KINDS",
    "UNEVEN_MULTIPLE",
    "CheckpointConfig",
    "ConfigError",
    "ContextParallelMethod",
    "DataConfig",
    "DataPhase",
    "GrowthStage",
    "KernelsConfig",
    "LayerSource",
    "LoggingConfig",
    "LossScaleConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterKind",
    "PipelineSchedule",
    "RunConfig",
    "ScheduleConfig",
    "TokenInit",
    "TrainingConfig",
    "grown_model",
    "keeps_outputs",
    "layer_sources",
    "load_config",
    "parse_config",
    "parse_data_path",
    "parse_split",
    "parse_token_option",
    "to_dict",
    "token_init",
    "widened_model",
]
