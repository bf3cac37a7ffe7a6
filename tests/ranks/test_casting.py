"""Casts of parameters that are kept for a step change no bit on any layout."""

from contextlib import nullcontext

import pytest

from megatron_tf.training.step import step
from tests.support.layouts import layout_config
from tests.support.training import training_run


def both_ways(mesh, config):
    """(curve with casts that are kept, whether curve and gradients are those of casts at each use)."""
    curve, gradients = training_run(mesh, config, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "keeping_casts", lambda model: nullcontext())
        expected_curve, expected = training_run(mesh, config, 3)
    same = all((gradients[name] == expected[name]).all() for name in expected)
    return curve, same and curve == expected_curve


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)], ids=str)
def test_kept_casts_change_no_bit(rank_pool, layout):
    training = {"precision": "bf16", "micro_batch_size": 1, "recompute_granularity": "full"}
    config = layout_config(layout, layout[0] > 1, training=training)
    curves, same = zip(*rank_pool.run(both_ways, *layout, config), strict=True)
    assert all(same)
    assert all(curve == curves[0] for curve in curves)
