"""One dispatch for what happens between a Pattention's two products, and the second product itself.

`eager` is PyTorch in chunks of rows that stay in a CPU's cache; `compiled` is the same mathematics through inductor;
`triton` are kernels of our own for GPUs, which go over the scores once where a row fits.
"""

import importlib.util
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.errors import UserError
from megatron_tf.extras import how_to_install
from megatron_tf.kernels.compiled import CompiledKernels
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.tokenformer.normalisation import Normalisation, Reduce

Choice = Literal["auto", "eager", "compiled", "triton"]
_TOKENS_PER_BLOCK = 128  # a BLAS may sum fewer tokens in another order when more follow; it was seen above 128
_LEAST_TOKENS = 8  # and fewer than four in yet another order: they are completed with zeros


class PattentionKernels(Protocol):
    """Between the products. `reduce` sums a row's number over tensor-parallel ranks; None where there is one."""

    name: ClassVar[str]
    """The choice that takes them."""

    def forward(self, norm: Normalisation, scores: Tensor, tau: Tensor, reduce: Reduce | None) -> tuple[Tensor, Tensor]:
        """Scores [R, n] and tau [R] -> (factor [R] in accumulation type, weights of the values [R, n])."""

    def backward(
        self, norm: Normalisation, scores: Tensor, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """(the weights again, gradient of the scores), each [R, n]; `grad`, that of the weights, may be overwritten."""


def choose_kernels(choice: Choice, device: torch.device) -> PattentionKernels:
    """The kernels for a device. `auto` is triton on a GPU that has it, compiled on one that has not, eager on
    a CPU. Raises UserError where what is asked for is not there, saying how to get it."""
    has_triton = importlib.util.find_spec("triton") is not None
    name = choice
    if choice == "auto":
        name = "eager" if device.type == "cpu" else "triton" if has_triton else "compiled"
    if name == "triton":
        if not has_triton:
            raise UserError(
                f"kernels.pattention=triton: triton is not installed: {how_to_install('triton')}, or choose auto"
            )
        if device.type == "cpu":
            raise UserError("kernels.pattention=triton needs a GPU: choose auto, eager or compiled")
        from megatron_tf.kernels.triton_kernels import TritonKernels

        return TritonKernels()
    return CompiledKernels() if name == "compiled" else EagerKernels()


def mix_values(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """out [R, E] = P [R, n] @ values [n, E]; in fp32 and fp64 on a CPU, tokens of weight zero change no bit of it.

    There, blocks of tokens are summed one after another, which growth by zero keys leaves as they are.
    """
    if weights.device.type != "cpu" or weights.dtype not in (torch.float32, torch.float64):
        torch.mm(weights, values, out=out)
        return
    blocks = list(zip(weights.split(_TOKENS_PER_BLOCK, 1), values.split(_TOKENS_PER_BLOCK), strict=True))
    weight, value = blocks[-1]
    missing = max(0, _LEAST_TOKENS - len(value))
    if missing:
        blocks[-1] = F.pad(weight, (0, missing)), F.pad(value, (0, 0, 0, missing))
    torch.mm(*blocks[0], out=out)
    for weight, value in blocks[1:]:
        out.addmm_(weight, value)
