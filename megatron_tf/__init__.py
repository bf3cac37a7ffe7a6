"""A Megatron-style trainer for TokenFormer language models that grow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from megatron_tf.layers.pattention import Pattention
    from megatron_tf.modules.adamw import GrownAdamW
    from megatron_tf.modules.growing import grow
    from megatron_tf.modules.tokenformer import TokenFormer

__version__ = "0.2.0"
__all__ = ["GrownAdamW", "Pattention", "TokenFormer", "grow", "load"]

_LAZY = {
    "GrownAdamW": "megatron_tf.modules.adamw",
    "Pattention": "megatron_tf.layers.pattention",
    "TokenFormer": "megatron_tf.modules.tokenformer",
    "grow": "megatron_tf.modules.growing",
}
"""Name -> where it is defined. They are imported at their first use, as tools without torch import this package too."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> TokenFormer:
    """Load a checkpoint of any layout as a plain nn.Module on one device: `logits = load(DIR)(token_ids)`.

    `dtype` is that of parameters and activations, fp32 by default. The module is in evaluation mode, and can be trained
    like any other. Raises UserError (megatron_tf.errors), which names the problem, if the checkpoint is invalid.
    """
    import torch  # imported here, as tools without torch import this package too

    from megatron_tf.modules.tokenformer import load

    return load(path, device=device, dtype=dtype or torch.float32)
