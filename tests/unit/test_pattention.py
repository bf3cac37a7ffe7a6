"""The Pattention layer against its formula written plainly, and its backward against autograd in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_tf.layers.pattention import Pattention, pattend

NORMS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


def plain_pattention(x, key, value, norm, tau):
    scores = x @ key.t()
    if norm == "l2_norm_gelu":
        weights = F.gelu(tau * scores / scores.norm(dim=-1, keepdim=True))
    elif norm == "gelu_l2_norm":
        weights = tau * F.gelu(scores) / F.gelu(scores).norm(dim=-1, keepdim=True)
    else:
        weights = tau * scores.softmax(-1)
    return weights @ value


def make_layers(norm, count, dtype=torch.float64):
    torch.manual_seed(1)
    layers = [Pattention(6, 5, num_tokens=40, norm_activation=norm).to(dtype) for _ in range(count)]
    for layer in layers:
        torch.nn.init.normal_(layer.key_tokens)
        torch.nn.init.normal_(layer.value_tokens)
    return layers


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("count", [1, 3])
def test_forward_and_backward_equal_autograd_of_the_formula(norm, count):
    layers = make_layers(norm, count)
    x = torch.randn(300, 2, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(count, 300, 2, 5, dtype=torch.float64)
    inputs = [x, *(p for layer in layers for p in layer.parameters())]
    y = pattend(x, layers)
    expected = torch.stack(
        [plain_pattention(x, layer.key_tokens, layer.value_tokens, norm, layer.tau) for layer in layers]
    )
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    got = torch.autograd.grad(y, inputs, dy)
    want = torch.autograd.grad(expected, inputs, dy)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm):
    layer = make_layers(norm, 1)[0]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x), (x,))


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_of_zeros_gives_finite_values_and_gradients(norm):
    layer = make_layers(norm, 1, torch.float32)[0]
    x = torch.zeros(3, 6, requires_grad=True)
    layer(x).sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, layer.key_tokens, layer.value_tokens))


def test_softmax_does_not_overflow():
    layer = make_layers("softmax", 1, torch.float32)[0]
    x = 1e4 * torch.randn(3, 6)
    assert layer(x).isfinite().all()


def test_a_new_module_has_the_temperature_of_its_number_of_tokens():
    assert Pattention(2, 2, num_tokens=49, norm_activation="l2_norm_gelu").tau == math.sqrt(49)
    assert Pattention(2, 2, num_tokens=49, norm_activation="softmax").tau == 49.0


def test_bf16_is_near_fp32():
    layer = make_layers("l2_norm_gelu", 1, torch.float32)[0]
    x = torch.randn(64, 6)
    torch.testing.assert_close(layer(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.3)
