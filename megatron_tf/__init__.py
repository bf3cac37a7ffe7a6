"""A Megatron-style trainer for TokenFormer language models that grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_tf.inference.model import LanguageModel

__version__ = "0.1.0"


def load(path: str | Path, device: str = "cpu") -> LanguageModel:
    """The model of a checkpoint of any layout, on one device, for evaluation: `logits = load(DIR)(token_ids)`."""
    from megatron_tf.inference.model import load_model  # tools that need no torch import this package too

    return load_model(path, device)
