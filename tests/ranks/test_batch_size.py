"""Steps of several sizes in one run: stages of a pipeline against one process, bit for bit."""

import dataclasses

import pytest

from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss, train_step
from tests.support.layouts import layout_config
from tests.support.training import random_batch


def run_of_sizes(mesh, config, sizes):
    """(loss, gradient norm) of a step of each size, and the loss of an evaluation between them."""
    state, curve = build_state(config, mesh), []
    for step, size in enumerate(sizes):
        sized = dataclasses.replace(config.training, global_batch_size=size, rampup_batch_size=None)
        batch = random_batch(dataclasses.replace(config, training=sized), step, mesh)
        result = train_step(state, batch, 1e-3)
        curve.append((result.loss, result.grad_norm, evaluation_loss(state, random_batch(config, 99, mesh))))
    return curve


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_pipeline_takes_batches_as_they_come(rank_pool, schedule):
    training = {"micro_batch_size": 1, "rampup_batch_size": [2, 2, 30]}
    sizes = [2, 4, 4, 8, 6, 8]
    whole = rank_pool.run(run_of_sizes, 1, 1, 1, layout_config((1, 1, 1), untied=True, training=training), sizes)
    config = layout_config((1, 2, 1), untied=True, schedule=schedule, training=training)
    assert rank_pool.run(run_of_sizes, 1, 2, 1, config, sizes) == whole * 2
