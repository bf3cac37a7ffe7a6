"""Which implementation computes what: from the configuration to functions, once at the start of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from megatron_tf.errors import UserError
from megatron_tf.extras import how_to_install
from megatron_tf.kernels import adapters, row_product
from megatron_tf.kernels.adapters import Attend, Linear, Normalise
from megatron_tf.kernels.compiled import CompiledKernels
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.pattention import PattentionKernels


@dataclass(frozen=True)
class Kernels:
    """What the layers compute with."""

    pattention: PattentionKernels = field(default_factory=EagerKernels)
    attend: Attend = adapters.sdpa
    normalise: Normalise = adapters.torch_norm
    linear: Linear = row_product.linear
    optimizer: str = "torch"
    automatic: Mapping[str, str] = field(default_factory=dict)
    """What `auto` took, by key."""
    warning: str = ""
    """Why `auto` did not take what it takes first; empty where it did."""

    @property
    def taken(self) -> str:
        """What `auto` took, for the log; empty where nothing was left to it."""
        return ", ".join(f"{key} {name}" for key, name in self.automatic.items())


def choose_kernels(requested: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Kernels:
    """Choose the kernels for a device and a type of activations; `requested` is the `kernels` section of a
    configuration.

    Raises UserError where a requested one can't be used here, saying how to get it.
    """
    pattention = choose_pattention(requested["pattention"], device)
    names: dict[str, str] = {"pattention": pattention.name}
    for key in ("attention", "norm", "optimizer"):
        adapters.require(key, requested[key], device)
        names[key] = _automatic(key, device, dtype) if requested[key] == "auto" else requested[key]
    if names["attention"] == "flash_attn" and dtype == torch.float32:
        raise UserError("kernels.attention=flash_attn computes in 16 bits: set training.precision=bf16, or choose sdpa")
    return Kernels(
        pattention=pattention,
        attend=_attend(names["attention"], device),
        normalise=_normalise(names["norm"]),
        linear=row_product.linear if device.type == "cpu" else F.linear,
        optimizer=names["optimizer"],
        automatic={key: name for key, name in names.items() if requested[key] == "auto"},
    )


def choose_decoding_kernels(device: torch.device) -> Kernels:
    """Choose the kernels that make the next token fastest: on a CPU, those for a few rows."""
    return Kernels(pattention=row_product.DecodingKernels() if device.type == "cpu" else EagerKernels())


def without_pattention_kernels(kernels: Kernels, failure: str) -> Kernels:
    """Replace a Pattention's kernels that `auto` took and that can't be built by eager ones.

    `failure` says why. Raises UserError where the configuration names the kernels.
    """
    if "pattention" not in kernels.automatic:
        raise UserError(f"kernels.pattention: {failure}, or choose eager")
    return replace(
        kernels,
        pattention=EagerKernels(),
        automatic={**kernels.automatic, "pattention": EagerKernels.name},
        warning=f"kernels.pattention: {failure}; auto falls back to eager",
    )


def choose_pattention(choice: str, device: torch.device) -> PattentionKernels:
    """Choose eager kernels, which are PyTorch in chunks of rows that a CPU's cache holds; compiled ones, the same
    mathematics through inductor; or Triton's, which go over the scores once where a row fits.

    `auto` is triton on a GPU that has it, compiled on one that has not, eager on a CPU. Raises UserError where a
    requested one can't be used here.
    """
    has_triton = adapters.is_installed("triton")
    if choice == "auto" and device.type != "cpu":
        choice = "triton" if has_triton else "compiled"
    if choice == "compiled":
        return CompiledKernels()
    if choice != "triton":
        return EagerKernels()
    if not has_triton:
        raise UserError(
            f"kernels.pattention=triton: triton is not installed: {how_to_install('triton')}, or choose auto"
        )
    if device.type == "cpu":
        raise UserError("kernels.pattention=triton needs a GPU: choose auto, eager or compiled")
    from megatron_tf.kernels.triton_kernels import TritonKernels

    return TritonKernels()


def _automatic(key: str, device: torch.device, dtype: torch.dtype) -> str:
    """What `auto` takes: torch's own, but flash-attn in 16 bits on a GPU that has it."""
    if key != "attention":
        return "torch"
    if device.type == "cuda" and dtype != torch.float32 and adapters.is_installed("flash_attn"):
        return "flash_attn"
    return "sdpa"


def _attend(name: str, device: torch.device) -> Attend:
    if name == "flash_attn":
        is_new = torch.cuda.get_device_capability(device) >= (9, 0)
        return adapters.flash_attention(version_4=is_new and adapters.is_installed("flash_attn.cute"))
    return adapters.transformer_engine_attention() if name == "transformer_engine" else adapters.sdpa


def _normalise(name: str) -> Normalise:
    if name == "apex":
        return adapters.apex_norm()
    return adapters.transformer_engine_norm() if name == "transformer_engine" else adapters.torch_norm
