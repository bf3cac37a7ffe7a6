"""fp8 on ranks: each scales its own part of an operand, and every layout stays as near to fp32 as one process does."""

import numpy as np
import pytest

from tests.support.layouts import layout_config
from tests.support.training import training_run

ALONE = (1, 1, 1)
CASES = [(ALONE, False), ((2, 1, 1), False), ((2, 1, 1), True), ((1, 2, 1), False), ((1, 1, 2), False)]
CASES += [((2, 2, 2), True)]


def run_config(layout, precision, sequence_parallel=False):
    return layout_config(layout, sequence_parallel, model={"proj_tokens": 32}, training={"precision": precision})


@pytest.fixture(scope="module")
def in_fp32(rank_pool):
    return rank_pool.run(training_run, *ALONE, run_config(ALONE, "fp32"), 6)[0]


@pytest.mark.parametrize(("layout", "sequence_parallel"), CASES, ids=str)
def test_every_layout_trains_nearly_as_fp32_does(rank_pool, in_fp32, layout, sequence_parallel):
    answers = rank_pool.run(training_run, *layout, run_config(layout, "fp8", sequence_parallel), 6)
    curves = [np.array(curve) for curve, _ in answers]
    assert all(np.array_equal(curve, curves[0]) for curve in curves)
    np.testing.assert_allclose(curves[0][:, 0], np.array(in_fp32[0])[:, 0], rtol=5e-3)
    np.testing.assert_allclose(curves[0][0, 1], in_fp32[0][0][1], rtol=0.05)
    got, want = (key_and_value_tokens(gradients) for gradients in (answers[0][1], in_fp32[1]))
    # through three layers; what a rank forgets to add, or adds twice, is half of it or more
    assert 0.01 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.25


def key_and_value_tokens(gradients):
    """Those of the first layer, which the first stage of every layout has."""
    names = [name for name in sorted(gradients) if name.startswith("layers.0.") and name.endswith("_tokens")]
    return np.concatenate([gradients[name].ravel() for name in names])
