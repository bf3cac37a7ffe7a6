"""The learning rate at the corners of every schedule."""

import pytest

from megatron_tf.config import OptimizerConfig
from megatron_tf.training.schedule import learning_rate, rewarmup

BASE = {"lr": 1.0, "min_lr": 0.1, "lr_warmup_iters": 10, "lr_decay_iters": 110}
CORNERS = {
    "cosine": ({}, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 35: 0.1 + 0.9 * 0.85355339, 60: 0.55, 110: 0.1, 999: 0.1}),
    "linear": ({}, {0: 0.1, 10: 1.0, 35: 0.775, 60: 0.55, 85: 0.325, 110: 0.1, 999: 0.1}),
    "constant": ({}, {0: 0.1, 9: 1.0, 60: 1.0, 999: 1.0}),
    "WSD": ({"lr_wsd_decay_iters": 20}, {0: 0.1, 10: 1.0, 89: 1.0, 90: 1.0, 100: 0.55, 110: 0.1, 999: 0.1}),
}


@pytest.mark.parametrize("style", CORNERS)
def test_corners(style):
    options, corners = CORNERS[style]
    config = OptimizerConfig(lr_decay_style=style, **BASE, **options)
    found = {step: learning_rate(config, step, 5000) for step in corners}
    assert found == pytest.approx(corners, abs=1e-7)


def test_a_tenth_decays_by_default_and_warm_up_can_be_a_fraction():
    config = OptimizerConfig(lr=1.0, lr_decay_style="WSD", lr_warmup_fraction=0.05)
    found = [learning_rate(config, step, 200) for step in (4, 9, 10, 180, 190, 200)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_the_decay_of_one_that_is_all_warm_up_is_safe():
    config = OptimizerConfig(lr=1.0, lr_warmup_iters=10, lr_decay_iters=10)
    assert [learning_rate(config, step, 10) for step in (9, 10, 11)] == [1.0, 1.0, 0.0]


def test_the_warm_up_after_growth():
    assert [rewarmup(step, 100, 4) for step in (100, 101, 103, 104, 500)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert rewarmup(100, 100, 0) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_warmup_fraction": 0.1}, "give one"),
        ({"lr_wsd_decay_iters": 5}, "is for lr_decay_style: WSD, it is cosine"),
        ({"min_lr": 2.0}, "is above lr"),
    ],
)
def test_settings_that_contradict(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**(BASE | options))
