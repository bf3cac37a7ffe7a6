"""fp16 with a loss scale on every layout: overflows change nothing, and the scale resumes from a checkpoint."""

import math

import numpy as np
import pytest

from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import forward_backward
from tests.support.layouts import layout_config
from tests.support.resumed import fp16_run
from tests.support.training import random_batch

LOSS_SCALE = {"initial_loss_scale": 2.0**32, "loss_scale_window": 4, "hysteresis": 1}


def fp16_config(layout, **sections):
    sections.setdefault("loss_scale", LOSS_SCALE)
    return layout_config(layout, layout[0] > 1, training={"precision": "fp16"}, **sections)


def sound(curve):
    return np.array([step[:2] for step in curve if not step[3]])


@pytest.fixture(scope="module")
def in_fp32(rank_pool):
    curve = rank_pool.run(fp16_run, 1, 1, 1, layout_config((1, 1, 1)), 6)[0]
    return sound(curve)


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 1), (2, 1, 2)], ids=str)
def test_the_curve_is_that_of_fp32(rank_pool, in_fp32, layout):
    answers = rank_pool.run(fp16_run, *layout, fp16_config(layout), 6)
    assert all(repr(answer) == repr(answers[0]) for answer in answers), "ranks disagree"
    overflows = [step for step in answers[0] if step[3]]
    assert len(overflows) > 3
    assert all(math.isfinite(loss) and not math.isfinite(norm) for loss, norm, _, _ in overflows)
    np.testing.assert_allclose(sound(answers[0])[:, 0], in_fp32[:, 0], rtol=1e-3)
    np.testing.assert_allclose(sound(answers[0])[:, 1], in_fp32[:, 1], rtol=2e-2)


def test_without_a_scale_small_gradients_vanish(rank_pool, in_fp32):
    """What the scale is for: gradients of a loss of 1e-7 underflow, those of 2^24 times it do not."""
    tiny, lifted = (
        rank_pool.run(small_gradients, 1, 1, 1, fp16_config((1, 1, 1), loss_scale={"loss_scale": scale}))[0]
        for scale in (2.0**-10, 2.0**12)
    )
    assert tiny > 10 * lifted
    assert lifted < 0.01


def small_gradients(mesh, config):
    """Share of the key tokens' gradients that are zero."""
    state = build_state(config, mesh)
    forward_backward(state, random_batch(config, 0, mesh))
    keys = [p.grad for name, p in state.model.named_parameters() if name.endswith("key_tokens")]
    return sum(int((grad == 0).sum()) for grad in keys) / sum(grad.numel() for grad in keys)


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_the_scale_resumes_bit_for_bit(rank_pool, tmp_path, layout):
    straight = rank_pool.run(fp16_run, *layout, fp16_config(layout), 7)[0]
    config = fp16_config(layout, checkpoint={"save": tmp_path})
    resumed = rank_pool.run(fp16_run, *layout, config, 3, tmp_path)[0]
    resumed += rank_pool.run(fp16_run, *layout, config, 7, tmp_path)[0]
    assert repr(resumed) == repr(straight)
    assert len({scale for _, _, scale, _ in resumed[-4:]}) > 1, "the scale is doubled after the resume"
