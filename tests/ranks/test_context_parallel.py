"""Context-parallel ranks share each sequence, and train what one process does."""

import numpy as np
import pytest

from tests.support.layouts import layout_config, whole_model
from tests.support.training import training_run

METHODS = ("ring", "all_to_all")


def context_config(layout, context, method="ring", **sections):
    parallel = {"context_parallel_size": context, "context_parallel_method": method} | sections.pop("parallel", {})
    return layout_config(layout, parallel=parallel, **sections)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", [2, 4])
def test_it(rank_pool, context, method):
    sections = {"training": {"precision": "fp64"}}
    one = rank_pool.run(training_run, 1, 1, 1, layout_config((1, 1, 1), **sections), 3)
    got = rank_pool.run(
        training_run, 1, 1, 1, context_config((1, 1, 1), context, method, **sections), 3, context=context
    )
    print(one[0][0], got[0][0])
    np.testing.assert_allclose(got[0][0], one[0][0], rtol=1e-9)
    gradients = whole_model((1, 1, 1), False, [g for _, g in got])
    for name, gradient in one[0][1].items():
        assert np.abs(gradients[name] - gradient).max() < 1e-9 * np.abs(gradient).max(), name
