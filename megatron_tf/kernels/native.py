"""Pattention kernels for a CPU in C++: each row of scores is normalized in cache and written once.

They compute in fp32, for scores in fp32 and bf16. Sums over a row are those of sixteen columns at a time, in whole
blocks padded with zeros: appended tokens of score zero do not change a single bit, and neither do threads.
"""

from typing import ClassVar

import torch
from torch import Tensor

from megatron_tf.kernels import _native
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.tokenformer.normalization import Normalization, Reduce

_ROWS = {torch.float32: _native.Fp32Rows, torch.bfloat16: _native.Bf16Rows}
DTYPES = frozenset(_ROWS)


class NativeKernels(EagerKernels):
    """Kernels in C++; what is on the meta device, and what torch compiles, is left to the eager ones."""

    name: ClassVar[str] = "native"

    def forward(
        self, norm: Normalization, scores: Tensor, *, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        if not can_compute(scores):
            return super().forward(norm, scores, tau=tau, reduce=reduce)
        rows = _rows(norm, scores)
        tau = _of_rows(tau, scores)
        factor, weights = torch.empty_like(tau), torch.empty_like(scores)
        if reduce is None:
            rows.forward(tau=tau.data_ptr(), factor=factor.data_ptr(), out=weights.data_ptr())
            return factor, weights
        statistic = torch.empty_like(tau)
        rows.statistics(out=statistic.data_ptr())
        factor = _of_rows(norm.factor(reduce(statistic), tau), scores)
        rows.weights(factor=factor.data_ptr(), out=weights.data_ptr())
        return factor, weights

    def backward(
        self, norm: Normalization, scores: Tensor, *, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        if not can_compute(scores, grad):
            return super().backward(norm, scores, factor=factor, grad=grad, tau=tau, reduce=reduce)
        assert grad.shape == scores.shape
        rows, weights = _rows(norm, scores), torch.empty_like(scores)
        tau, factor = _of_rows(tau, scores), _of_rows(factor, scores)
        if reduce is None:
            rows.backward(tau=tau.data_ptr(), factor=factor.data_ptr(), grad=grad.data_ptr(), out=weights.data_ptr())
            return weights, grad
        inner = torch.empty_like(factor)
        rows.backward_activation(
            factor=factor.data_ptr(), grad=grad.data_ptr(), out=weights.data_ptr(), inner=inner.data_ptr()
        )
        share = _of_rows(reduce(inner) * tau**-norm.tau_power, scores)
        rows.backward_norm(factor=factor.data_ptr(), share=share.data_ptr(), grad=grad.data_ptr())
        return weights, grad


def can_compute(*tensors: Tensor) -> bool:
    """Return whether the C++ functions support these tensors, all of one dtype."""
    dtype = tensors[0].dtype
    return (
        dtype in DTYPES
        and all(
            tensor.dtype == dtype
            and tensor.device.type == "cpu"
            and type(tensor) is Tensor  # a subclass may have no memory
            and tensor.is_contiguous()
            for tensor in tensors
        )
        and not torch.compiler.is_compiling()  # it can't trace raw pointers passed to C++
    )


def _rows(norm: Normalization, scores: Tensor) -> _native.Fp32Rows:
    rows, tokens = scores.shape
    return _ROWS[scores.dtype](
        scores.data_ptr(), norm=norm.name, rows=rows, tokens=tokens, threads=torch.get_num_threads()
    )


def _of_rows(numbers: Tensor, scores: Tensor) -> Tensor:
    """Return one number for each row, as the C++ functions read them."""
    assert numbers.shape == scores.shape[:1]
    return numbers.to(torch.float32).contiguous()
