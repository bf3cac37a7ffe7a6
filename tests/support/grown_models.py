"""Checkpoints in memory with random tensors, and the logits and gradients of their models, to prove growth in fp64."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import ModelConfig
from megatron_tf.inference.model import LanguageModel
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support.records import make_record

VOCABULARY = 19
COUNTS = {"qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 32}
SHARED = {
    "num_layers": 3,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 1,
    "rotary_percent": 0.5,
}
TRANSFORMER = SHARED | {"layer": "transformer", "ffn_tokens": 32}
STEPS = 40
"""Updates that the Adam moments of a random checkpoint have accumulated."""


class MemoryCheckpoint:
    """A checkpoint of tensors in memory: group -> name -> tensor."""

    directory = Path("memory")

    def __init__(self, tensors: dict[str, dict[str, Tensor]], record: RunRecord) -> None:
        self.tensors = tensors
        self.record = record

    def groups(self):
        return list(self.tensors)

    def names(self, group):
        return list(self.tensors.get(group, {}))

    def shape(self, group, name):
        return tuple(self.tensors[group][name].shape)

    def dtype(self, group, name):
        return self.tensors[group][name].dtype

    def read_rows(self, group, name, *, start, stop):
        return self.tensors[group][name][start:stop].clone()


def tokenformer(**keys) -> ModelConfig:
    """Configure a small TokenFormer; keywords are keys of its configuration."""
    return ModelConfig(**{**SHARED, **COUNTS, **keys})


def random_checkpoint(model: ModelConfig, dtype: torch.dtype = torch.float64) -> MemoryCheckpoint:
    """Make a checkpoint whose tensors, Adam moments and temperatures are all random and far from the initial ones.

    There are enough tokens that no text has only negative scores: their norm under gelu_l2_norm would not be far
    above the epsilon that is added to it.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, dict[str, Tensor]] = {group: {} for group in ("model", "exp_avg", "exp_avg_sq")}
    for group, named in tensors.items():
        for name, parameter in model_parameters(model).items():
            rows = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            named[name] = (rows.square() if group == "exp_avg_sq" else rows).to(dtype)
    record = make_record(model, step=STEPS, adam_steps=STEPS)
    for place, path in enumerate(record.tau):
        record.tau[path] *= 1 + 0.01 * place  # none is a function of the number of tokens
    return MemoryCheckpoint(tensors, record)


def read(checkpoint: Checkpoint) -> MemoryCheckpoint:
    """Read all of a checkpoint to memory."""
    tensors = {}
    for group in checkpoint.groups():
        tensors[group] = {
            name: checkpoint.read_rows(group, name, start=0, stop=checkpoint.shape(group, name)[0])
            for name in checkpoint.names(group)
        }
    return MemoryCheckpoint(tensors, checkpoint.record)


def model_of(checkpoint: Checkpoint) -> LanguageModel:
    """Build the model of a checkpoint, which computes in the type of its tensors."""
    tensors = read(checkpoint).tensors["model"]
    dtype = tensors["embedding.weight"].dtype
    transformer = TokenFormer(checkpoint.record.model, dtype=dtype).to(dtype)
    own = dict(transformer.named_parameters())
    assert list(own) == list(tensors)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    for path, module in transformer.pattentions().items():
        module.tau = checkpoint.record.tau[path]
    return LanguageModel(transformer, checkpoint.record)


def logits_of(checkpoint: Checkpoint) -> Tensor:
    """Return the logits of two fixed texts."""
    with torch.no_grad():
        return model_of(checkpoint)(_texts())


def gradients_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the gradient of every parameter by name, from autograd, for a fixed function of the logits."""
    model = model_of(checkpoint).train()
    logits = model(_texts())
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * weights.to(logits.dtype)).mean().backward()
    return {name: parameter.grad for name, parameter in model.transformer.named_parameters()}


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value of `one`."""
    return float((one - other).abs().max() / one.abs().max())


def _texts() -> Tensor:
    return torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
