"""The loss's Triton kernels in Triton's interpreter against float64; run with TRITON_INTERPRET=1."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from megatron_tf.kernels import triton_loss
from megatron_tf.kernels.loss import EagerLoss
from megatron_tf.kernels.triton_loss import TritonLoss

assert os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest error relative to the largest entry of a gradient."""


@pytest.fixture(params=[64, 4096], ids=["blocks of 64", "blocks of 4096"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(triton_loss, "_BLOCK", request.param)


def make_logits(n, dtype, offset):
    """Rows of n logits about `offset`, the last of them minus infinity but for one, and a target for each but one."""
    generator = torch.Generator().manual_seed(n)
    logits = (3 * torch.randn(6, n, generator=generator) + offset).to(dtype)
    logits[5, 1:] = -torch.inf
    targets = torch.randint(n, (6,), generator=generator)
    targets[2], targets[3], targets[5] = -1, n - 1, 0
    return logits, targets


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4])
@pytest.mark.parametrize("n", [2, 37, 64, 700, 5000])
def test_kernels_equal_float64(n, offset, dtype, blocks):
    logits, targets = make_logits(n, dtype, offset)
    wide = logits.double()
    log_total, chosen = TritonLoss().statistics(logits, targets)
    want_total, want_chosen = EagerLoss().statistics(wide, targets)
    torch.testing.assert_close(log_total.double(), want_total, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(chosen.double(), want_chosen, rtol=0, atol=0)
    scale = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0])
    # from the same logarithm: what is checked is the gradient, not how exp enlarges the rounding of 1e4
    TritonLoss().gradient(logits, targets, log_total=log_total, scale=scale)
    EagerLoss().gradient(wide, targets, log_total=log_total.double(), scale=scale.double())
    assert (logits.double() - wide).abs().max() <= ROUNDING[dtype] * wide.abs().max()


def test_a_logit_that_is_not_a_number_reaches_the_statistics():
    logits, targets = make_logits(37, torch.float32, 0.0)
    logits[0, 20], logits[1, 5] = torch.nan, torch.inf
    logits[2] = -torch.inf
    found, _ = TritonLoss().statistics(logits, targets)
    expected, _ = EagerLoss().statistics(logits, targets)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[:3].isnan().all()


def test_wide_types_are_left_to_the_eager_kernels():
    logits, targets = make_logits(37, torch.float64, 0.0)
    copy = logits.clone()
    found, expected = TritonLoss().statistics(logits, targets), EagerLoss().statistics(copy, targets)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for kernels, values in ((TritonLoss(), logits), (EagerLoss(), copy)):
        kernels.gradient(values, targets, log_total=expected[0], scale=torch.ones(6, dtype=torch.float64))
    assert torch.equal(logits, copy)
