"""Configurations and batches for the report's runs, made in memory."""

from typing import Any

import torch

from benchmarks.gpu_report.scale import Shape
from megatron_tf.config import RunConfig, parse_config
from megatron_tf.data.batch import Batch
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.step.state import TrainState, build_state
from megatron_tf.training.step.step import train_step

VOCABULARY = 101


def make_config(model: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """Make the configuration of a run; each keyword adds keys to one section."""
    values: dict[str, dict[str, Any]] = {
        "model": model,
        "training": {"seq_length": 64, "micro_batch_size": 4, "global_batch_size": 8, "train_iters": 1000},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 0},
        "data": {"data_path": ["unused"], "tokenizer_type": "NullTokenizer"},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    return parse_config(RunConfig, values, "gpu report")


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """Make the configuration of a model that learns within a few steps; all sizes are multiples of 16, as fp8 needs."""
    model = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "qkv_tokens": 64,
        "proj_tokens": 64,
        "ffn_tokens": 256,
        "vocab_size": VOCABULARY,
    }
    return make_config(model, **sections)


def step_config(shape: Shape, *, micro_batch: int, layer: str = "tokenformer", **training: Any) -> RunConfig:
    """Make the configuration of a published shape with one micro-batch per step."""
    sizes = {"seq_length": shape.seq_length, "micro_batch_size": micro_batch, "global_batch_size": micro_batch}
    return make_config(shape.model(layer), training=sizes | {"precision": "bf16"} | training)


def loss_curve(config: RunConfig, mesh: Mesh, steps: int) -> list[float]:
    """Train on sequences that count up by a stride of one to three; returns the loss of each step."""
    state = build_state(config, mesh)
    return [train_step(state, counting_batch(config, step), 3e-3).loss for step in range(steps)]


def counting_batch(config: RunConfig, step: int) -> Batch:
    """Make the batch of a step from samples that are learned within a few steps."""
    training = config.training
    generator = torch.Generator().manual_seed(step)
    size = (training.global_batch_size, 1)
    start, stride = torch.randint(VOCABULARY, size, generator=generator), torch.randint(1, 4, size, generator=generator)
    ids = (start + stride * torch.arange(training.seq_length + 1)) % VOCABULARY
    return _batch(config, ids)


def random_batch(config: RunConfig, step: int, *, micro_batch: int | None = None) -> Batch:
    """Make a batch of one micro-batch of random ids."""
    size = micro_batch or config.training.micro_batch_size
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(config.model.vocab_size, (size, config.training.seq_length + 1), generator=generator)
    return _batch(config, ids, size)


def _batch(config: RunConfig, ids: torch.Tensor, micro_batch: int | None = None) -> Batch:
    micro_batch = micro_batch or config.training.micro_batch_size
    targets = ids.shape[0] * (ids.shape[1] - 1)
    numbers = torch.arange(ids.shape[0])
    return Batch(ids.unflatten(0, (-1, micro_batch)), numbers.unflatten(0, (-1, micro_batch)), targets)


def parameter_bytes(state: TrainState) -> int:
    """Return the bytes of parameters, gradients and Adam moments in fp32, and of the 16-bit copy of the weights."""
    return 18 * sum(shard.tensor.numel() for shard in state.shards)
