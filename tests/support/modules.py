"""A tiny model in memory, for tests of modules in one process."""

import torch

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "qkv_tokens": 24,
    "proj_tokens": 16,
    "ffn_tokens": 64,
    "vocab_size": 50,
    "make_vocab_size_divisible_by": 64,
}


def draw_ids(samples=3, length=9):
    """Return random ids of the model, the same at each call."""
    return torch.randint(MODEL["vocab_size"], (samples, length), generator=torch.Generator().manual_seed(0))
