"""Attention and layer norms from third-party packages, each behind one signature; torch's own are the reference.

A package is imported only once it is chosen, so all of them are optional.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.errors import UserError
from megatron_tf.extras import how_to_install

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [S, B, h, d] -> [S, B, h, d]: causal attention scaled by 1/sqrt(d)."""
Linear = Callable[[Tensor, Tensor], Tensor]
"""x [..., D], weight [N, D] of the same dtype -> x weight^T [..., N]."""


class Normalize(Protocol):
    """A layer norm over the last dimension, with an optional affine transformation."""

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, epsilon: float) -> Tensor:
        """Normalize x [..., D] over D, with weight [D] and bias [D]."""


HOW_TO_GET = {
    "flash_attn": f"{how_to_install('flash_attn')}, or flash-attn-4, on a GPU machine with a compiler",
    "transformer_engine": f"{how_to_install('transformer_engine')} on a GPU machine",
    "apex": "build it from its sources with --cuda_ext: https://github.com/NVIDIA/apex",
}


def require(key: str, choice: str, device: torch.device) -> None:
    """Check that the package `choice` can be used on `device`.

    Raises UserError, which says how to install it, if it can't.
    """
    if choice in HOW_TO_GET and not is_installed(choice):
        raise UserError(f"kernels.{key}={choice}: it is not installed: {HOW_TO_GET[choice]}; or choose auto")
    if choice in HOW_TO_GET and device.type != "cuda":
        raise UserError(f"kernels.{key}={choice} needs a GPU: choose auto or torch's own")


def is_installed(package: str) -> bool:
    """Return whether `package` can be found, without importing it."""
    return importlib.util.find_spec(package) is not None


def describe_broken(package: str, error: Exception) -> str:
    """Return one line about a package that is installed and that raised `error` when it was imported."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return (
        f"it is installed but can't be imported with torch {torch.__version__}: {type(error).__name__}: {line}: "
        f"reinstall it ({HOW_TO_GET[package]}), or choose torch's own"
    )


def optimizer_module(choice: str) -> Any:
    """Import what holds the optimizer: torch.optim, apex.optimizers or transformer_engine.pytorch.optimizers."""
    names = {"apex": "apex.optimizers", "transformer_engine": "transformer_engine.pytorch.optimizers"}
    return importlib.import_module(names.get(choice, "torch.optim"))


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """Apply torch.nn.functional.scaled_dot_product_attention, with a causal mask, to q, k, v [S, B, h, d]."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    if q.is_meta and not dropout_p:
        # torch would choose the implementation that saves the scores of all pairs of tokens, which devices do not
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
        return out.permute(2, 0, 1, 3)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True).permute(2, 0, 1, 3)


def flash_attention(version_4: bool) -> Attend:
    """Wrap flash_attn_func of flash-attn 2, or of flash-attn 4 (the module flash_attn.cute); both take [B, S, h, d]."""
    function = importlib.import_module("flash_attn.cute" if version_4 else "flash_attn").flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(t.transpose(0, 1) for t in (q, k, v)), causal=True)
        out = out[0] if isinstance(out, tuple) else out  # version 4 also returns the log-sum-exp
        return out.transpose(0, 1)

    return attend


def transformer_engine_attention() -> Attend:
    """Wrap DotProductAttention of transformer-engine, which returns the heads flattened."""
    layer_class = importlib.import_module("transformer_engine.pytorch").DotProductAttention

    @functools.cache
    def module(heads: int, width: int) -> Any:
        return layer_class(heads, width, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(*q.shape[-2:])(q.contiguous(), k.contiguous(), v.contiguous())
        return out.unflatten(-1, q.shape[-2:])

    return attend


def torch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, epsilon: float) -> Tensor:
    """Apply torch.nn.functional.layer_norm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def apex_norm() -> Normalize:
    """Wrap fused_layer_norm and fused_layer_norm_affine of apex."""
    module = importlib.import_module("apex.normalization.fused_layer_norm")

    def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, epsilon: float) -> Tensor:
        shape = tuple(x.shape[-1:])
        out: Tensor
        if weight is None:
            out = module.fused_layer_norm(x, shape, eps=epsilon)
        else:
            out = module.fused_layer_norm_affine(x, weight, bias, shape, eps=epsilon)
        return out

    return normalize


def transformer_engine_norm() -> Normalize:
    """Wrap LayerNorm of transformer-engine, called with our weight and bias, or with ones and zeros without them."""
    layer_class = importlib.import_module("transformer_engine.pytorch").LayerNorm

    @functools.cache
    def module(width: int, epsilon: float, device: torch.device, dtype: torch.dtype) -> Any:
        return layer_class(width, eps=epsilon, device=device, params_dtype=dtype).requires_grad_(False)

    def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, epsilon: float) -> Tensor:
        given = {} if weight is None or bias is None else {"weight": weight, "bias": bias}
        layer = module(x.shape[-1], epsilon, x.device, x.dtype)
        out: Tensor = torch.func.functional_call(layer, given, (x,))
        return out

    return normalize
