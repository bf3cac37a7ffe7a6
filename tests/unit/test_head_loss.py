"""The loss together with the head's product: against float64 autograd, in chunks of any size, in bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tf.kernels.loss import EagerLoss
from megatron_tf.layers import cross_entropy as cross_entropy_module
from megatron_tf.layers.cross_entropy import IGNORE_INDEX, head_loss

TOKENS, WIDTH, VOCABULARY = 29, 8, 11
DIVISOR = 17.0
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the norm of a gradient."""


@pytest.fixture(params=[1, 7 * VOCABULARY, 1 << 26], ids=["a token a chunk", "five chunks", "one chunk"])
def in_chunks(request, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "_CPU_LOGITS", request.param)


def make_inputs(dtype, num_ignored=5):
    hidden = (2 * torch.randn(TOKENS, WIDTH)).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[torch.randperm(TOKENS)[:num_ignored]] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def loss_of(hidden, weight, targets):
    return head_loss(hidden, weight, targets, divisor=DIVISOR, group=None, kernels=EagerLoss())


def in_float64(hidden, weight, targets):
    """Loss and gradients by autograd, from the values that the products have."""
    wide = [hidden.detach().double(), weight.detach().to(hidden.dtype).double()]
    wide = [tensor.requires_grad_() for tensor in wide]
    loss = F.cross_entropy(wide[0] @ wide[1].t(), targets, ignore_index=IGNORE_INDEX, reduction="sum") / DIVISOR
    return loss.detach(), *torch.autograd.grad(loss, wide)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradients_are_those_of_float64(dtype, in_chunks):
    hidden, weight, targets = make_inputs(dtype)
    loss = loss_of(hidden, weight, targets)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    (3 * loss).backward()
    expected, *gradients = in_float64(hidden, weight, targets)
    assert abs(loss.double() - expected) < TOLERANCE[dtype] * expected
    assert (hidden.grad.dtype, weight.grad.dtype) == (dtype, weight.dtype)
    for found, gradient in zip((hidden.grad, weight.grad), gradients, strict=True):
        assert (found.double() - 3 * gradient).norm() < TOLERANCE[dtype] * (3 * gradient).norm()
    assert not hidden.grad[targets == IGNORE_INDEX].any()


def test_a_loss_without_gradients_is_the_same(in_chunks):
    hidden, weight, targets = make_inputs(torch.float32)
    with torch.no_grad():
        alone = loss_of(hidden, weight, targets)
    assert torch.equal(alone, loss_of(hidden, weight, targets).detach())


def test_nothing_but_ignored_targets_is_a_loss_of_zero():
    hidden, weight, targets = make_inputs(torch.float32, num_ignored=TOKENS)
    loss = loss_of(hidden, weight, targets)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_logit_that_is_not_finite_reaches_the_loss():
    hidden, weight, targets = make_inputs(torch.float32, num_ignored=0)
    with torch.no_grad():
        weight[3] = torch.inf
    assert loss_of(hidden, weight, targets).isnan()


def test_more_chunks_lose_no_precision_in_bf16(monkeypatch):
    """The weight's gradient is summed over 29 chunks in fp32."""
    hidden, weight, targets = make_inputs(torch.bfloat16)
    expected = in_float64(hidden, weight, targets)[2]
    errors = []
    for chunk in (1 << 26, 1):
        monkeypatch.setattr(cross_entropy_module, "_CPU_LOGITS", chunk)
        (found,) = torch.autograd.grad(loss_of(hidden, weight, targets), weight)
        errors.append(float((found.double() - expected).norm() / expected.norm()))
    assert errors[1] < 1.5 * errors[0] < 1e-2


class Watch(TorchDispatchMode):
    """Counts operations, and the elements of the largest tensor that one returns."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))])
        return out


def test_the_logits_of_a_micro_batch_are_never_stored_whole_and_take_few_launches():
    """8,192 tokens of the 1.5B model, as a GPU would run them; storing 412 M logits took 2,600 operations."""
    with torch.device("meta"):
        hidden = torch.empty(8192, 1536, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(50304, 1536, requires_grad=True)
        targets = torch.empty(8192, dtype=torch.int64)
    with Watch() as watch:
        loss_of(hidden, weight, targets).backward()
    assert watch.largest == max(weight.numel(), 2048 * 50304)
    assert watch.operations < 300


def test_no_token_is_a_loss_of_zero():
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    loss = loss_of(hidden, torch.randn(VOCABULARY, WIDTH), torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0
