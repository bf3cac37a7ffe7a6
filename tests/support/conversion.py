"""Checkpoints of small untrained models."""

import torch

from megatron_tf.checkpoint.reshard import Target, reshard
from megatron_tf.commands import convert_checkpoint
from megatron_tf.config import ModelConfig
from megatron_tf.convert.external import ExternalCheckpoint, TokenizerChoice, external_record, in_memory
from megatron_tf.data.tokenizer import build_tokenizer
from megatron_tf.tokenformer.parameters import initial_taus, model_parameters
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
    tensors = {name: in_memory(torch.randn(p.shape) * scale) for name, p in model_parameters(config).items()}
    tau = {path: tau * tau_scale for path, tau in initial_taus(config).items()}
    kind, path = tokenizer or ("HFTokenizer", write_tokenizer(folder / "tokenizer.json", config.vocab_size))
    identity = build_tokenizer(kind, path).identity
    choice = TokenizerChoice(kind, path, identity, eod_token)
    record = external_record(config, choice, tau=tau, seq_length=64, seed=1)
    target = Target(tensor_parallel=1, stages=[range(config.num_layers)])
    source = ExternalCheckpoint(folder, tensors, record)
    return reshard(source, folder / "run", target)


def convert(source, target, load, save, *options):
    """Run tools/convert_checkpoint.py and return its exit code."""
    return convert_checkpoint.main(
        ["--from", source, "--to", target, "--load", str(load), "--save", str(save), *map(str, options)]
    )
