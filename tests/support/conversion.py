"""Checkpoints of small models that no run has trained."""

import sys

import torch

from megatron_tf.checkpoint.foreign import ForeignCheckpoint, TokenizerChoice, in_memory, new_metadata
from megatron_tf.checkpoint.reshard import Target, reshard
from megatron_tf.commands import convert_checkpoint
from megatron_tf.config import ModelConfig
from megatron_tf.data.tokenizer import build_tokenizer
from megatron_tf.model.parallelize import is_replicated
from megatron_tf.model.tokenformer import TokenFormer
from tests.support.data import write_tokenizer

SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "qkv_tokens": 32,
    "proj_tokens": 24,
    "ffn_tokens": 64,
    "vocab_size": 60,
    "make_vocab_size_divisible_by": 16,
}


def save_small_model(folder, tau_scale=1.0, tokenizer=None, scale=0.3, eod_token=None, **model):
    """A checkpoint without optimizer state, of normal random numbers times `scale`; tau are `tau_scale` times the
    initial ones.

    `tokenizer` is (type, file), `eod_token` the end of a document that its run names; keywords are keys of the model.
    """
    config = ModelConfig(**{**SMALL, **model})
    torch.manual_seed(0)
    transformer = TokenFormer(config)
    tensors = {name: in_memory(torch.randn(p.shape) * scale) for name, p in transformer.named_parameters()}
    tau = {name: module.tau * tau_scale for name, module in transformer.pattentions().items()}
    kind, path = tokenizer or ("HFTokenizer", write_tokenizer(folder / "tokenizer.json", config.vocab_size))
    identity = build_tokenizer(kind, path).identity
    metadata = new_metadata(config, tau, TokenizerChoice(kind, path, identity, eod_token), 64, 1)
    target = Target(1, 1, lambda name: 0, is_replicated)
    source = ForeignCheckpoint(folder, tensors, metadata)
    return reshard(source, folder / "run", target, lambda: None, sys.stderr.isatty())


def convert(source, target, load, save, *options):
    """The exit code of tools/convert_checkpoint.py."""
    return convert_checkpoint.main(
        ["--from", source, "--to", target, "--load", str(load), "--save", str(save), *map(str, options)]
    )
