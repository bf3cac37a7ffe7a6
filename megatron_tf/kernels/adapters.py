"""Attention and norms from the packages of the field, behind one signature each; torch's own are the measure.

Nothing here is imported before it is chosen: none of these packages is needed where none is installed.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.errors import UserError
from megatron_tf.extras import how_to_install

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [S, B, h, d] -> [S, B, h, d]: causal attention scaled by 1/sqrt(d)."""
Normalise = Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
"""(x [..., D], weight [D], bias [D], epsilon) -> layer norm of x over D."""

HOW_TO_GET = {
    "flash_attn": f"{how_to_install('flash_attn')}, or flash-attn-4, on a GPU machine with a compiler",
    "transformer_engine": f"{how_to_install('transformer_engine')} on a GPU machine",
    "apex": "build it from its sources with --cuda_ext: https://github.com/NVIDIA/apex",
}


def require(key: str, choice: str, device: torch.device) -> None:
    """Raise UserError, saying how to get it, unless the package `choice` can be used on `device`."""
    if choice in HOW_TO_GET and importlib.util.find_spec(choice) is None:
        raise UserError(f"kernels.{key}={choice}: it is not installed: {HOW_TO_GET[choice]}; or choose auto")
    if choice in HOW_TO_GET and device.type != "cuda":
        raise UserError(f"kernels.{key}={choice} needs a GPU: choose auto or torch's own")


def is_installed(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True).permute(2, 0, 1, 3)


def flash_attention(version_4: bool) -> Attend:
    """flash_attn_func of flash-attn 2, or of flash-attn 4, which lives in flash_attn.cute; both take [B, S, h, d]."""
    function = importlib.import_module("flash_attn.cute" if version_4 else "flash_attn").flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(t.transpose(0, 1) for t in (q, k, v)), causal=True)
        out = out[0] if isinstance(out, tuple) else out  # version 4 also returns the log-sum-exp
        return out.transpose(0, 1)

    return attend


def transformer_engine_attention() -> Attend:
    """DotProductAttention of transformer-engine, which flattens heads on the way out."""
    kind = importlib.import_module("transformer_engine.pytorch").DotProductAttention
    made: dict[tuple[int, int], Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, width = q.shape[-2:]
        if (heads, width) not in made:
            made[heads, width] = kind(heads, width, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal")
        out: Tensor = made[heads, width](q.contiguous(), k.contiguous(), v.contiguous())
        return out.unflatten(-1, (heads, width))

    return attend


def torch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """torch.nn.functional.layer_norm."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def apex_norm() -> Normalise:
    """fused_layer_norm and fused_layer_norm_affine of apex."""
    module = importlib.import_module("apex.normalization.fused_layer_norm")

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
        shape = tuple(x.shape[-1:])
        out: Tensor = (
            module.fused_layer_norm(x, shape, epsilon)
            if weight is None
            else module.fused_layer_norm_affine(x, weight, bias, shape, epsilon)
        )
        return out

    return normalise


def transformer_engine_norm() -> Normalise:
    """LayerNorm of transformer-engine, called with our weight and bias; ones and zeros where there are none."""
    kind = importlib.import_module("transformer_engine.pytorch").LayerNorm
    made: dict[tuple[int, float, torch.dtype], Any] = {}

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
        key = x.shape[-1], epsilon, x.dtype
        if key not in made:
            made[key] = kind(x.shape[-1], eps=epsilon, device=x.device, params_dtype=x.dtype).requires_grad_(False)
        given = {} if weight is None or bias is None else {"weight": weight, "bias": bias}
        out: Tensor = torch.func.functional_call(made[key], given, (x,))
        return out

    return normalise
