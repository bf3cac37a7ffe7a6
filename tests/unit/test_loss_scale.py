"""The loss scale: its corners, and fp16 layers against float64 where fp16 sums would overflow."""

import pytest
import torch

from megatron_tf.config import LossScaleConfig
from megatron_tf.layers.cross_entropy import token_losses
from megatron_tf.layers.pattention import Pattention
from megatron_tf.tokenformer.normalization import NORMALIZATIONS
from megatron_tf.training.step.loss_scale import LossScaler

CONFIG = LossScaleConfig(initial_loss_scale=8.0, min_loss_scale=2.0, loss_scale_window=3, hysteresis=2)


def scales(scaler, outcomes):
    """After each step: (scale, whether the scale was to blame); "x" is an overflow."""
    blamed = [(scaler.update(outcome != "x"), scaler.scale) for outcome in outcomes]
    return [(scale, blame) for blame, scale in blamed]


def test_it_halves_after_the_hysteresis_and_doubles_after_the_window():
    found = scales(LossScaler(CONFIG, is_fp16=True), "x.x...x")
    assert found == [(8, True), (8, False), (4, True), (4, False), (4, False), (8, False), (8, True)]


def test_at_its_minimum_it_is_not_to_blame():
    assert scales(LossScaler(CONFIG, is_fp16=True), "xxxxx") == [
        (8, True),
        (4, True),
        (2, True),
        (2, False),
        (2, False),
    ]


def test_a_constant_scale_and_other_types_stay():
    assert scales(LossScaler(LossScaleConfig(loss_scale=64.0), is_fp16=True), "x....") == [(64, False)] * 5
    assert scales(LossScaler(CONFIG, is_fp16=False), "x....") == [(1, False)] * 5


@pytest.mark.parametrize("stop", range(9))
def test_it_resumes_where_it_was(stop):
    outcomes = "x.x...x.x"
    straight, first, second = (LossScaler(CONFIG, is_fp16=True) for _ in range(3))
    expected = scales(straight, outcomes)
    before = scales(first, outcomes[:stop])
    second.load(first.state())
    assert before + scales(second, outcomes[stop:]) == expected


def test_a_checkpoint_without_one_leaves_the_first():
    scaler = LossScaler(CONFIG, is_fp16=True)
    scaler.load(None)
    assert scaler.scale == 8
    assert LossScaler(CONFIG, is_fp16=False).state() is None


def test_settings_that_contradict():
    with pytest.raises(ValueError, match=r"initial_loss_scale \(1.0\) is below min_loss_scale \(2.0\)"):
        LossScaleConfig(initial_loss_scale=1.0, min_loss_scale=2.0)


@pytest.mark.parametrize("norm", NORMALIZATIONS)
def test_statistics_that_fp16_could_not_hold(norm):
    """Scores of about 150 over 512 tokens: their squares add up to 1e7, fp16 ends at 65,504."""
    torch.manual_seed(0)
    layer = Pattention(64, 64, num_tokens=512, norm_activation=norm)
    for tokens in layer.parameters():
        torch.nn.init.normal_(tokens, std=1.0 if norm != "softmax" else 0.02)
    x = (20 if norm != "softmax" else 1) * torch.randn(10, 64)
    weights = torch.randn(10, 64)

    def run(x, layer):
        x = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        (y * weights.to(y.dtype)).sum().backward()
        return y.detach().double(), x.grad.double(), *(p.grad.double() for p in layer.parameters())

    found, expected = run(x.half(), layer), run(x.half().double(), layer.double())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 5e-3 * b.norm()


def test_the_loss_of_fp16_logits_is_fp32():
    logits = (300 * torch.randn(7, 1000)).half()
    losses = token_losses(logits, torch.arange(7))
    assert losses.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.double(), torch.arange(7), reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-4)
