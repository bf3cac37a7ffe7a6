"""Dropout's Triton kernel in Triton's interpreter: the bits of PyTorch; run with TRITON_INTERPRET=1, as tests/run.sh
does."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from megatron_tf.kernels import dropout, triton_dropout

assert os.environ.get("TRITON_INTERPRET") == "1"
STREAM = 2**63 - 25
"""As large as a stream's number can be."""


def assert_same(found, expected):
    """The same bits; in bf16 the same zeros and as much as the interpreter cuts off where a GPU rounds."""
    if found.dtype == torch.bfloat16:
        assert torch.equal(found == 0, expected == 0)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected)


def tensors(n, dtype):
    generator = torch.Generator().manual_seed(n)
    x, residual, grad = (torch.randn(3, 2, n, generator=generator).to(dtype) for _ in range(3))
    seeds = torch.randint(-(2**63), 2**63 - 1, (3, 2), generator=generator)
    return x.requires_grad_(), residual.requires_grad_(), grad, seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 37, 128, 2050])
@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_it_drops_the_elements_that_pytorch_drops_forward_and_backward(n, dtype, rate):
    x, _, grad, seeds = tensors(n, dtype)
    found = triton_dropout.drop(x, seeds, stream=STREAM, rate=rate)
    expected = dropout.drop(x, seeds, stream=STREAM, rate=rate)
    assert_same(found, expected)
    assert n < 37 or 0 < int((found == 0).sum()) < found.numel()
    gradients = [torch.autograd.grad(out, x, grad)[0] for out in (found, expected)]
    assert_same(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_residual_is_added_within_one_rounding(dtype):
    x, residual, grad, seeds = tensors(300, dtype)
    options = {"stream": STREAM, "rate": 0.3}
    found = triton_dropout.drop(x, seeds, residual=residual, **options)
    wide = dropout.drop(x.double(), seeds, residual=residual.double(), **options)
    torch.testing.assert_close(found.double(), wide, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    x_grad, residual_grad = torch.autograd.grad(found, [x, residual], grad)
    assert_same(x_grad, torch.autograd.grad(dropout.drop(x, seeds, **options), x, grad)[0])
    assert torch.equal(residual_grad, grad)


def test_what_is_not_contiguous_is_dropped_alike():
    x, residual, _, seeds = tensors(64, torch.float32)
    options = {"stream": 5, "rate": 0.5}
    turned = [t.detach().transpose(0, 1) for t in (x, residual)]
    found = triton_dropout.drop(turned[0], seeds.t(), residual=turned[1], **options)
    expected = dropout.drop(turned[0].contiguous(), seeds.t(), residual=turned[1], **options)
    torch.testing.assert_close(found, expected)
