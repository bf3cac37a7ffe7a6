"""Schedules that split the backward, combined with what reads or changes a step: results are those of one process."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_tf.config import RunConfig, parse_config, to_dict
from tests.support.layouts import layout_config
from tests.support.resumed import fp16_run, resume, train_and_save
from tests.support.rows import inspected_step, trained
from tests.support.training import training_run

ALONE, LAYOUT = (1, 1, 1), (1, 2, 1)
SPLIT = pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv"])


def config_of(layout, schedule="1f1b", precision="fp32", **sections):
    """Four layers with untied embeddings, and four micro-batches of one sample."""
    training = {"micro_batch_size": 1, "global_batch_size": 4, "seq_length": 8, "precision": precision}
    return layout_config(layout, untied=True, schedule=schedule, model={"num_layers": 4}, training=training, **sections)


@pytest.fixture(scope="module")
def in_one_process(rank_pool):
    """The result of function(mesh, configuration on one rank, ...), computed once for all schedules."""
    results = {}

    def run(function, *args, **keys):
        key = function, args
        if key not in results:
            results[key] = rank_pool.run(function, *ALONE, config_of(ALONE, **keys), *args)[0]
        return results[key]

    return run


@SPLIT
def test_fp16_overflows_and_scales_as_one_process(rank_pool, in_one_process, schedule):
    """To the bit: losses, norms, and the scale after each step."""
    sections = {"precision": "fp16"}
    sections["loss_scale"] = {"initial_loss_scale": 2.0**18, "loss_scale_window": 2, "hysteresis": 1}
    expected = in_one_process(fp16_run, 4, **sections)
    overflows = [step[3] for step in expected]
    assert overflows[0]
    assert overflows.count(False) == 4
    scales = [step[2] for step in expected]
    assert any(after > before for before, after in pairwise(scales)), "no scale is raised again"
    for answer in rank_pool.run(fp16_run, *LAYOUT, config_of(LAYOUT, schedule, **sections), 4):
        assert repr(answer) == repr(expected)


@SPLIT
def test_fp8_is_that_of_one_process(rank_pool, in_one_process, schedule):
    """To the bit: the products of both halves."""
    expected, _ = in_one_process(training_run, 2, precision="fp8")
    for curve, _ in rank_pool.run(training_run, *LAYOUT, config_of(LAYOUT, schedule, "fp8"), 2):
        assert curve == expected


@SPLIT
def test_rows_are_measured_as_in_one_process(rank_pool, in_one_process, schedule):
    """In both stages of each rank, and without a change of any bit of the training."""
    expected = in_one_process(inspected_step)
    config = config_of(LAYOUT, schedule)
    for answer in rank_pool.run(inspected_step, *LAYOUT, config):
        for name in ("growth", "kind", "layer", "tokens", "dead"):
            assert [getattr(row, name) for row in answer] == [getattr(row, name) for row in expected]
        for name in ("grad_norm", "update_norm", "contribution"):
            found, wanted = ([getattr(row, name) for row in rows] for rows in (answer, expected))
            np.testing.assert_allclose(found, wanted, rtol=1e-12, err_msg=name)
    plain, inspected = (rank_pool.run(trained, *LAYOUT, config, is_inspected, 2) for is_inspected in (False, True))
    for (results, tensors), (other_results, other_tensors) in zip(plain, inspected, strict=True):
        assert results == other_results
        assert all(np.array_equal(*pair) for pair in zip(tensors, other_tensors, strict=True))


@SPLIT
def test_width_grows_as_in_one_process(rank_pool, tmp_path, schedule):
    """The third step, after the growth, is that of one process to the bit."""

    def growing(*arguments):
        values = to_dict(config_of(*arguments, checkpoint={"save": str(tmp_path)}))
        values["growth"] = [{"at_step": 2, "hidden_multiple": 2, "ffn_tokens": 96}]
        return parse_config(RunConfig, values, "test")

    rank_pool.run(train_and_save, *LAYOUT, growing(LAYOUT, schedule), tmp_path)
    expected = rank_pool.run(resume, *ALONE, growing(ALONE))[0]
    assert rank_pool.run(resume, *LAYOUT, growing(LAYOUT, schedule)) == [expected, expected]
