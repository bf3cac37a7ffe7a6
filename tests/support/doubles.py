"""Models in float64, as checkpoints in memory and as modules."""

from dataclasses import replace

import torch

from megatron_tf.config import ModelConfig
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tokenformer.parameters import initial_taus, model_parameters
from tests.support import training
from tests.support.grown_models import MemoryCheckpoint
from tests.support.records import make_record
from tests.support.training import PLAIN

TOKENFORMER = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "qkv_tokens": 12,
    "proj_tokens": [8, 10],
    "ffn_tokens": 20,
    "vocab_size": 30,
    "make_vocab_size_divisible_by": 8,
    "rotary_percent": 0.5,
}
TRANSFORMER = {**TOKENFORMER, **PLAIN}
STRONG = {**TOKENFORMER, **training.STRONG}


def random_parameters(config: ModelConfig, seed=0):
    """{name: float64 tensor} of a model whose logits are far apart."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: parameter.initial.constant + 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in model_parameters(config).items()
    }


def checkpoint_of(config: ModelConfig, tensors, **counters):
    """A checkpoint with these tensors, by group, and temperatures that are not the initial ones."""
    taus = {path: 1.3 * tau for path, tau in initial_taus(config).items()}
    return MemoryCheckpoint(tensors, replace(make_record(config, **counters), tau=taus))


def read_group(checkpoint, group="model"):
    """{name: whole tensor} of a group."""
    return {
        name: checkpoint.read_rows(group, name, start=0, stop=checkpoint.shape(group, name)[0])
        for name in checkpoint.names(group)
    }


def model_of(checkpoint) -> TokenFormer:
    """The module with the parameters and temperatures of a checkpoint, in its dtype."""
    tensors = read_group(checkpoint)
    dtype = tensors["embedding.weight"].dtype
    model = TokenFormer(checkpoint.record.model, dtype=dtype).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    for path, module in model.pattentions().items():
        module.tau = checkpoint.record.tau[path]
    return model


def ids_of(config: ModelConfig):
    """Two texts of 11 ids."""
    return torch.randint(config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(checkpoint):
    """The logits of a text, and the gradient of a loss by parameter."""
    model = model_of(checkpoint)
    ids = ids_of(checkpoint.record.model)
    logits = model(ids)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.t().roll(-1, 0).flatten())
    loss.backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}
