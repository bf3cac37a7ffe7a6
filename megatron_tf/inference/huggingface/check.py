"""Whether an export computes, once transformers has loaded it, what the checkpoint does."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.data.bpe_engine import PROBES
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.inference.model import load_model

TOLERANCE = 2e-5
"""Largest difference of logits that counts as none."""
_IDS = (2, 64)


def has_transformers() -> bool:
    """Whether the check can be made; protobuf is what transformers reads SentencePiece models with."""
    return all(importlib.util.find_spec(package) for package in ("transformers", "google", "google.protobuf"))


@torch.no_grad()
def logits_difference(checkpoint: Path, export: Path, dtype: torch.dtype) -> tuple[float, float]:
    """(largest difference of the logits of fixed random ids, largest logit); one model is loaded after the other."""
    model = load_model(checkpoint).to(dtype)
    model.transformer.dtype = dtype
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, _IDS, generator=generator)
    ours = model(ids)
    del model
    theirs = load_export(export, dtype)(ids, use_cache=False).logits
    if theirs.shape != ours.shape:
        raise CheckpointError(f"{export}: logits are {list(theirs.shape)}, expected {list(ours.shape)}")
    return float((ours - theirs).abs().max()), float(ours.abs().max())


def load_export(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as its users get it, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype).eval()


def tokenizer_difference(directory: Path, tokenizer: Tokenizer) -> str | None:
    """The first text of those easily got wrong that transformers encodes otherwise; None where there is none."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    expected = [row.tolist() for row in tokenizer.encode_batch(PROBES).rows()]
    found: Sequence[list[int]] = [theirs(text, add_special_tokens=False, verbose=False)["input_ids"] for text in PROBES]
    pairs = zip(PROBES, expected, found, strict=True)
    return next((text for text, wanted, have in pairs if wanted != have), None)


def convert_tokenizer(directory: Path) -> None:
    """Write tokenizer.json from a SentencePiece model, which not every version of transformers converts alike."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
