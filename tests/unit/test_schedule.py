"""The learning rate at the corners of every schedule, and what holds of any of them."""

import itertools
import math

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tf.checkpoint.generations import Generation
from megatron_tf.config import OptimizerConfig
from megatron_tf.training.step.schedule import learning_rate

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
    found = {step: learning_rate(config, step, train_iters=5000) for step in corners}
    assert found == pytest.approx(corners, abs=1e-7)


def test_a_tenth_decays_by_default_and_warm_up_can_be_a_fraction():
    config = OptimizerConfig(lr=1.0, lr_decay_style="WSD", lr_warmup_fraction=0.05)
    found = [learning_rate(config, step, train_iters=200) for step in (4, 9, 10, 180, 190, 200)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_the_decay_of_one_that_is_all_warm_up_is_safe():
    config = OptimizerConfig(lr=1.0, lr_warmup_iters=10, lr_decay_iters=10)
    found = [learning_rate(config, step, train_iters=10) for step in (9, 10, 11)]
    assert found == [1.0, 0.0, 0.0]  # min_lr at lr_decay_iters


def test_the_warm_up_after_growth():
    generation, factors = Generation(rewarmup_iters=4), []
    for _ in range(6):
        factors.append(generation.rewarmup)
        generation = generation.advanced()
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Generation().rewarmup == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_warmup_fraction": 0.1}, "give one"),
        ({"lr_wsd_decay_iters": 5}, "need lr_decay_style: WSD, but it is cosine"),
        ({"min_lr": 2.0}, "is above lr"),
    ],
)
def test_settings_that_contradict(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**(BASE | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_warmup_tokens": 5}, r"needs lr_decay_tokens and no key in steps, got \['lr_warmup_tokens'\]"),
        ({"lr_decay_tokens": 50, "lr_warmup_iters": 5}, "no key in steps"),
        ({"lr_decay_tokens": 50, "lr_warmup_tokens": 5, "lr_warmup_fraction": 0.1}, "given twice"),
    ],
)
def test_tokens_and_steps_are_not_mixed(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(lr=1.0, **options)


@st.composite
def schedules(draw):
    """(the schedule by steps, the same by tokens, tokens of a step, steps to its end)."""
    style = draw(st.sampled_from(sorted(CORNERS)))
    end, step_tokens = draw(st.integers(2, 300)), draw(st.integers(1, 5000))
    lengths = {"warmup": draw(st.integers(0, end - 1)), "decay": end}
    if style == "WSD":
        lengths["wsd_decay"] = draw(st.integers(1, end - lengths["warmup"]))
    rates = {"lr": 1e-3, "min_lr": draw(st.floats(0, 1e-3)), "lr_decay_style": style}
    by_steps = OptimizerConfig(**rates, **{f"lr_{key}_iters": length for key, length in lengths.items()})
    in_tokens = {f"lr_{key}_tokens": length * step_tokens for key, length in lengths.items()}
    return by_steps, OptimizerConfig(**rates, **in_tokens), step_tokens, end


@settings(deadline=None)
@given(schedules())
def test_any_schedule_is_continuous_clamped_and_the_same_by_steps_and_by_tokens(case):
    config, in_tokens, step_tokens, end = case
    rates = [learning_rate(config, step, train_iters=10**6) for step in range(end + 20)]
    by_tokens = [
        learning_rate(in_tokens, 0, train_iters=10**6, tokens=step * step_tokens, step_tokens=step_tokens)
        for step in range(end + 20)
    ]
    assert by_tokens == pytest.approx(rates, rel=1e-9)
    assert all(0 < rate <= config.lr for rate in rates[: config.lr_warmup_iters + 1])
    assert all(config.min_lr * (1 - 1e-9) <= rate <= config.lr * (1 + 1e-9) for rate in rates[config.lr_warmup_iters :])
    assert rates[end:] == [config.lr if config.lr_decay_style == "constant" else config.min_lr] * 20
    decay = config.lr_wsd_decay_iters or end - config.lr_warmup_iters
    steepest = max(config.lr / max(1, config.lr_warmup_iters), (config.lr - config.min_lr) * math.pi / 2 / decay)
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) <= steepest * (1 + 1e-9)


@settings(deadline=None)
@given(schedules(), st.integers(1, 7), st.integers(0, 20000))
def test_a_warm_up_by_tokens_ends_at_the_rate_whatever_a_step_has(case, factor, tokens):
    _, config, step_tokens, _ = case
    rate = learning_rate(config, 0, train_iters=10**6, tokens=tokens, step_tokens=step_tokens * factor)
    assert 0 <= rate <= config.lr * (1 + 1e-9)
    if tokens < config.lr_warmup_tokens <= tokens + step_tokens * factor:
        assert rate == config.lr
