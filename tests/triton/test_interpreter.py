"""The Triton kernels in Triton's interpreter against float64; run with TRITON_INTERPRET=1, as tests/run.sh does."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from megatron_tf.kernels import triton_kernels
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.triton_kernels import TritonKernels
from megatron_tf.tokenformer import normalization
from megatron_tf.tokenformer.normalization import NORMALIZATIONS
from tests.support.hard_scores import LENGTHS, check_kernels

assert os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Largest error relative to the largest entry: some units in the last place of the type."""


def tensors(n, dtype, rows=5):
    generator = torch.Generator().manual_seed(n)
    scores, grad = (torch.randn(rows, n, generator=generator).to(dtype) for _ in range(2))
    scores[-1] = 0  # a row without a norm
    scores[0, 0] = 30  # exp of it overflows in fp16
    return scores, grad, torch.full((rows,), n**0.5, dtype=torch.float64)


def as_reduced(values):
    """A sum over one rank: it takes the path of shared rows."""
    return values * 1


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("path", ["held", "long", "shared"])
@pytest.mark.parametrize("n", [2, 37, 128, 700])
def test_kernels_equal_float64(norm, dtype, path, n, monkeypatch):
    if path == "long":
        monkeypatch.setattr(triton_kernels, "LARGEST_HELD_ROW", 0)
    monkeypatch.setattr(normalization, "_EPSILON_FP64", normalization.EPSILON)  # of the row of zeros, as in fp32
    reduce = as_reduced if path == "shared" else None
    scores, grad, tau = tensors(n, dtype)
    wide = scores.double(), grad.double()
    wide_grad = grad.double()
    factor, weights = TritonKernels().forward(norm, scores, tau=tau, reduce=reduce)
    want_factor, want_weights = EagerKernels().forward(norm, wide[0], tau=tau, reduce=None)
    torch.testing.assert_close(factor.double(), want_factor, rtol=1e-5, atol=1e-5)
    assert weights.dtype == dtype
    tolerance = ROUNDING[dtype]
    if norm.is_logarithmic and dtype == torch.float32:
        tolerance = 2 * (30 + abs(float(factor[0]))) * 2**-24  # exp(a + f), where a and f are near 30 and rounded
    close(weights, want_weights, tolerance)
    again, grad = TritonKernels().backward(norm, scores, factor=factor, grad=grad, tau=tau, reduce=reduce)
    assert torch.equal(again, weights)
    _, want = EagerKernels().backward(norm, wide[0], factor=want_factor, grad=wide[1], tau=tau, reduce=None)
    # where one weight is nearly all of its row, what is left of its gradient is a small difference of such terms
    terms = want_weights.abs().max() * wide_grad.abs().max() if norm.is_logarithmic else 1.0
    close(grad[:-1] / terms, want[:-1] / terms, tolerance)  # the gradient of a row of zeros is 1e6 and more
    assert grad[-1].isfinite().all() or dtype == torch.float16


def close(found, expected, tolerance):
    assert (found.double() - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("reduce", [None, as_reduced], ids=["whole", "shared"])
@pytest.mark.parametrize("n", LENGTHS)
def test_scores_far_from_zero_equal_float64(norm, dtype, reduce, n):
    check_kernels(TritonKernels(), norm, n, dtype, reduce=reduce)


def test_small_values_of_gelu_are_as_accurate_as_large_ones():
    x = torch.linspace(-12, 12, 4801, dtype=torch.float32)
    factor, weights = TritonKernels().forward(
        NORMALIZATIONS["gelu_l2_norm"], x[None], tau=torch.tensor([60.0]), reduce=None
    )
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() * 0.5**0.5)
    error = (weights[0] / factor - exact).abs() / exact.abs().clamp(min=1e-35)
    # the argument of the exponential is rounded, too
    assert (error <= 1e-6 * (1 + x.square() / 2)).all()
