"""Choose the implementation of every kernel from the configuration, once at the start of a run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from megatron_tf.errors import UserError
from megatron_tf.extras import how_to_install
from megatron_tf.kernels import adapters, fp8, row_product
from megatron_tf.kernels.adapters import Attend, Linear, Normalize
from megatron_tf.kernels.compiled import CompiledKernels
from megatron_tf.kernels.documents import AttendDocuments, AttendEach, AttendTogether, flash_varlen, torch_varlen
from megatron_tf.kernels.dropout import Drop, drop
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.loss import EagerLoss, LossKernels
from megatron_tf.kernels.native import DTYPES, NativeKernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.kernels.products import PlainProducts, Products
from megatron_tf.kernels.rotary import Rotate, rotate

T = TypeVar("T")
_COMPUTES_FP64 = {
    "pattention": ("eager", "compiled"),
    "attention": ("sdpa",),
    "norm": ("torch",),
    "optimizer": ("torch",),
}
"""Key of the configuration -> the implementations that compute in fp64; `auto` takes the first."""


@dataclass(frozen=True)
class Kernels:
    """The implementations that the layers and the optimizer use."""

    pattention: PattentionKernels = field(default_factory=NativeKernels)
    """By default those of a CPU, which leave every other device and dtype to the eager ones."""
    attend: Attend = adapters.sdpa
    attend_documents: AttendDocuments = field(default_factory=AttendEach)
    normalize: Normalize = adapters.torch_norm
    linear: Linear = row_product.linear
    loss: LossKernels = field(default_factory=EagerLoss)
    products: Products = field(default_factory=PlainProducts)
    """What multiplies a Pattention's matrices."""
    optimizer: str = "torch"
    automatic: Mapping[str, str] = field(default_factory=dict)
    """The implementation that `auto` selected, by configuration key."""
    warning: str = ""
    """Why `auto` fell back from its first choice; empty if it did not."""
    not_in_fp8: str = ""
    """What training.precision fp8 leaves in bf16, and why; empty if nothing."""

    @property
    def drop(self) -> Drop:
        """Dropout: Triton's where a Pattention has Triton's kernels, which this machine can then build."""
        if self.pattention.name != "triton":
            return drop
        from megatron_tf.kernels import triton_dropout

        return triton_dropout.drop

    @property
    def rotate(self) -> Rotate:
        """Rotary embedding: Triton's on the same condition."""
        if self.pattention.name != "triton":
            return rotate
        from megatron_tf.kernels import triton_rotary

        return triton_rotary.rotate

    @property
    def taken(self) -> str:
        """Return the selections of `auto` as one line for the log; empty if there were none."""
        return ", ".join(f"{key} {name}" for key, name in self.automatic.items())


def choose_kernels(requested: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Kernels:
    """Choose the kernels for a device and the dtype of activations.

    `requested` is the `kernels` section of a configuration. If the package that `auto` selects can't be imported
    although it is installed, torch's own implementation is used, and `warning` says why. Raises UserError, which says
    how to install it, if a requested implementation can't be used here.
    """
    wanted = _in_fp64(requested) if dtype == torch.float64 else requested
    pattention = choose_pattention(wanted["pattention"], device, dtype)
    names: dict[str, str] = {"pattention": pattention.name}
    for key in ("attention", "norm", "optimizer"):
        adapters.require(key, wanted[key], device)
        names[key] = _automatic(key, device, dtype) if wanted[key] == "auto" else wanted[key]
    if names["attention"] == "flash_attn" and dtype == torch.float32:
        raise UserError("kernels.attention=flash_attn computes in 16 bits: set training.precision=bf16, or choose sdpa")
    warning = ""
    try:
        attend = _import("attention", names["attention"], lambda: _attend(names["attention"], device))
    except UserError as error:
        if requested["attention"] != "auto":
            raise
        attend, names["attention"] = adapters.sdpa, "sdpa"
        warning = f"{error}; auto falls back to sdpa"
    _import("optimizer", names["optimizer"], lambda: adapters.optimizer_module(names["optimizer"]))
    return Kernels(
        pattention=pattention,
        attend=attend,
        attend_documents=_attend_documents(names["attention"], device, dtype),
        normalize=_import("norm", names["norm"], lambda: _normalize(names["norm"])),
        linear=row_product.linear if device.type == "cpu" else F.linear,
        loss=_loss(pattention),
        optimizer=names["optimizer"],
        automatic={key: name for key, name in names.items() if requested[key] == "auto"},
        warning=warning,
    )


def choose_decoding_kernels(device: torch.device) -> Kernels:
    """Choose the kernels with the lowest latency per token: on a CPU, those for a few rows."""
    return Kernels(pattention=row_product.DecodingKernels() if device.type == "cpu" else EagerKernels())


def with_fp8_products(
    kernels: Kernels, scaling: fp8.Scaling, *, device: torch.device, sizes: Iterable[tuple[str, int]]
) -> Kernels:
    """Let every Pattention multiply in fp8; `sizes` are those of its products, as (what it is, how many).

    Raises UserError for a GPU that does not multiply in fp8.
    """
    is_compiled = not isinstance(kernels.pattention, EagerKernels)
    products = fp8.choose_products(scaling, device, is_compiled=is_compiled)
    return replace(kernels, products=products, not_in_fp8=fp8.say_what_does_not_fit(sizes))


def without_pattention_kernels(kernels: Kernels, failure: str) -> Kernels:
    """Fall back to the eager Pattention kernels because those that `auto` selected can't be built.

    `failure` says why. Raises UserError if the configuration requests the kernels by name.
    """
    if "pattention" not in kernels.automatic:
        raise UserError(f"kernels.pattention: {failure}, or choose eager")
    warning = f"kernels.pattention: {failure}; auto falls back to eager"
    return replace(
        kernels,
        pattention=EagerKernels(),
        loss=EagerLoss(),
        automatic={**kernels.automatic, "pattention": EagerKernels.name},
        warning="; ".join(filter(None, (kernels.warning, warning))),
    )


def choose_pattention(choice: str, device: torch.device, dtype: torch.dtype) -> PattentionKernels:
    """Choose the Pattention kernels for a device and the dtype of the scores.

    eager: PyTorch, in chunks of rows that fit into a CPU's cache.
    native: C++ for a CPU, in fp32 and bf16, row by row.
    compiled: the arithmetic of eager through inductor.
    triton: Triton kernels, which read the scores once if a row fits into registers.
    auto: triton on a GPU if it is installed, else compiled; on a CPU native, or eager in the other dtypes.

    Raises UserError if the requested kernels can't be used here.
    """
    has_triton = adapters.is_installed("triton")
    has_native = device.type == "cpu" and dtype in DTYPES
    if choice == "auto":
        on_gpu = "triton" if has_triton else "compiled"
        choice = on_gpu if device.type != "cpu" else "native" if has_native else "eager"
    if choice == "compiled":
        return CompiledKernels()
    if choice == "native" and not has_native:
        raise UserError(
            "kernels.pattention=native needs a CPU and training.precision fp32 or bf16: choose auto or eager"
        )
    if choice == "native":
        return NativeKernels()
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


def _in_fp64(requested: Mapping[str, Any]) -> dict[str, str]:
    """Return `requested` with `auto` replaced by what computes in fp64. Raises UserError for what does not."""
    wanted = {}
    for key, known in _COMPUTES_FP64.items():
        wanted[key] = known[0] if requested[key] == "auto" else requested[key]
        if wanted[key] not in known:
            raise UserError(
                f"kernels.{key}={wanted[key]} does not compute in training.precision=fp64: choose {' or '.join(known)}"
            )
    return wanted


def _automatic(key: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `auto`: torch's own implementation, except flash-attn in 16 bits on a GPU if it is installed."""
    if key != "attention":
        return "torch"
    if device.type == "cuda" and dtype != torch.float32 and adapters.is_installed("flash_attn"):
        return "flash_attn"
    return "sdpa"


def _loss(pattention: PattentionKernels) -> LossKernels:
    """Return Triton kernels if the Pattention has them: both can be built, or neither."""
    if pattention.name != "triton":
        return EagerLoss()
    from megatron_tf.kernels.triton_loss import TritonLoss

    return TritonLoss()


def _import(key: str, name: str, make: Callable[[], T]) -> T:
    """Call `make`, which imports the package `name`; raise UserError, with its first line, for whatever it raises."""
    try:
        return make()
    except Exception as error:  # a package built for another torch or CUDA raises errors of any type when imported
        if name not in adapters.HOW_TO_GET:
            raise
        raise UserError(f"kernels.{key}={name}: {adapters.describe_broken(name, error)}") from error


def _attend(name: str, device: torch.device) -> Attend:
    if name == "flash_attn":
        return adapters.flash_attention(version_4=_takes_version_4(device))
    return adapters.transformer_engine_attention() if name == "transformer_engine" else adapters.sdpa


def _attend_documents(name: str, device: torch.device, dtype: torch.dtype) -> AttendDocuments:
    """Choose attention within documents: all in one call of flash attention if there is one, else each in its own."""
    if name == "flash_attn":
        return AttendTogether(flash_varlen(version_4=_takes_version_4(device)))
    is_16_bit = dtype in (torch.bfloat16, torch.float16)
    if name == "sdpa" and device.type == "cuda" and is_16_bit and torch.cuda.get_device_capability(device) >= (8, 0):
        return AttendTogether(torch_varlen())
    return AttendEach(_attend(name, device))


def _takes_version_4(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and adapters.is_installed("flash_attn.cute")


def _normalize(name: str) -> Normalize:
    if name == "apex":
        return adapters.apex_norm()
    return adapters.transformer_engine_norm() if name == "transformer_engine" else adapters.torch_norm
