"""A Megatron-style trainer for TokenFormer language models that grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from megatron_tf.inference.model import LanguageModel

__version__ = "0.2.0"


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """The model of a checkpoint of any layout, a plain nn.Module on one device: `logits = load(DIR)(token_ids)`.

    `dtype` is that of parameters and activations, fp32 by default. Raises UserError (megatron_tf.errors) naming
    what is wrong with the checkpoint.
    """
    import torch  # tools that need no torch import this package too

    from megatron_tf.inference.model import load_model

    return load_model(path, device=device, dtype=dtype or torch.float32)
