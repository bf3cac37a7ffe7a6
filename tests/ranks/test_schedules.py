"""Every pipeline schedule trains the model of one process, evaluates it, and saves what any other can resume from."""

import numpy as np
import pytest

from megatron_tf.config import RunConfig, parse_config, to_dict
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss, train_step
from tests.support.layouts import layout_config, whole_model
from tests.support.resumed import resume, train_and_save
from tests.support.training import PLAIN, random_batch, training_run

STEPS = 2
SCHEDULES = ["interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
UNTIED = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


def config_of(layout, schedule="1f1b", untied=True, **sections):
    """The small run with five layers and eight micro-batches on each replica."""
    model = {"num_layers": 5} | sections.pop("model", {})
    training = {"micro_batch_size": 1, "global_batch_size": 8 * layout[2]} | sections.pop("training", {})
    return layout_config(
        layout, layout[0] > 1, untied=untied, schedule=schedule, model=model, training=training, **sections
    )


def assert_trains_as_one_process(rank_pool, layout, schedule, *, is_exact, **options):
    reference, expected = rank_pool.run(training_run, 1, 1, 1, one_process(layout, **options), STEPS)[0]
    config = config_of(layout, schedule, **options)
    answers = rank_pool.run(training_run, *layout, config, STEPS)
    if is_exact:
        assert [curve for curve, _ in answers] == [reference] * len(answers)
    else:
        np.testing.assert_allclose(answers[0][0], reference, rtol=1e-5)
    untied = options.get("untied", True)
    gradients = whole_model(layout, untied, [gradients for _, gradients in answers])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradient - expected[name]) <= 1e-5 * np.linalg.norm(expected[name]), name


def one_process(layout, **options):
    """Configure the same global batches on one rank."""
    training = options.pop("training", {}) | {"global_batch_size": 8 * layout[2]}
    return config_of((1, 1, 1), training=training, **options)


@UNTIED
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_trains_as_one_process(rank_pool, schedule, untied):
    """To the bit; with tied embeddings, whose gradient is a sum over stages, up to rounding."""
    assert_trains_as_one_process(rank_pool, (1, 2, 1), schedule, is_exact=untied, untied=untied)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_tensor_sequence_and_data_parallelism(rank_pool, schedule):
    assert_trains_as_one_process(rank_pool, (2, 2, 2), schedule, is_exact=False, untied=False)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_with_recomputation(rank_pool, schedule, granularity):
    training = {"recompute_granularity": granularity}
    assert_trains_as_one_process(rank_pool, (1, 2, 1), schedule, is_exact=True, training=training)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_plain_transformer(rank_pool, schedule):
    assert_trains_as_one_process(rank_pool, (1, 2, 1), schedule, is_exact=True, model=dict(PLAIN))


@pytest.mark.parametrize(
    ("schedule", "ranks", "parallel"),
    [
        ("1f1b", 3, {"pipeline_model_parallel_layout": [1, 3, 1]}),
        ("interleaved_1f1b", 2, {"pipeline_model_parallel_layout": [2, 1, 1, 1]}),
        ("zbv", 2, {"pipeline_model_parallel_layout": [1, 1, 1, 2]}),
        ("interleaved_zero_bubble", 3, {"num_virtual_stages_per_pipeline_rank": 1}),
        ("interleaved_1f1b", 2, {"num_virtual_stages_per_pipeline_rank": 4}),
    ],
    ids=str,
)
def test_stages_by_hand_and_other_numbers_of_stages(rank_pool, schedule, ranks, parallel):
    model = {"num_layers": 8 if parallel.get("num_virtual_stages_per_pipeline_rank") == 4 else 5}
    options = {"model": model, "training": {"global_batch_size": 12}}
    reference = rank_pool.run(training_run, 1, 1, 1, config_of((1, 1, 1), **options), STEPS)[0][0]
    config = config_of((1, ranks, 1), schedule, parallel=parallel, **options)
    for curve, _ in rank_pool.run(training_run, 1, ranks, 1, config, STEPS):
        assert curve == reference


def losses_around_a_step(mesh, config):
    """(evaluation, training, evaluation): evaluation must leave no trace in training."""
    state, batch = build_state(config, mesh), random_batch(config, 0, mesh)
    before = evaluation_loss(state, batch)
    trained = train_step(state, batch, config.optimizer.lr)
    return before, trained.loss, trained.grad_norm, evaluation_loss(state, random_batch(config, 1, mesh))


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_evaluates_as_one_process(rank_pool, schedule, layout):
    expected = rank_pool.run(losses_around_a_step, 1, 1, 1, one_process(layout))[0]
    assert expected[0] == expected[1]
    for losses in rank_pool.run(losses_around_a_step, *layout, config_of(layout, schedule)):
        np.testing.assert_allclose(losses, expected, rtol=1e-6 if layout[2] > 1 else 0)


@UNTIED
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [("interleaved_1f1b", "interleaved_1f1b"), ("zbv", "zbv"), ("dualpipev", "1f1b"), ("1f1b", "zbv")],
)
def test_any_placement_resumes_from_any_other(rank_pool, tmp_path, saved, resumed, untied):
    """To the bit: the checkpoint knows layers, not stages."""
    layout = (1, 2, 1)
    expected = rank_pool.run(train_and_save, *layout, config_of(layout, saved, untied), tmp_path)[0]
    config = config_of(layout, resumed, untied, checkpoint={"load": tmp_path})
    assert rank_pool.run(resume, *layout, config) == [expected, expected]


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])
def test_layers_grow_under_virtual_stages(rank_pool, tmp_path, schedule):
    """The grown model computes what it did, and trains as in one process from then on."""

    def run_of(layout, schedule="1f1b"):
        values = to_dict(config_of(layout, schedule, checkpoint={"save": tmp_path}))
        return parse_config(RunConfig, values | {"growth": [{"at_step": 2, "num_layers": 7, "ffn_tokens": 96}]}, "test")

    layout = (1, 2, 1)
    rank_pool.run(train_and_save, *layout, run_of(layout, schedule), tmp_path)
    expected = rank_pool.run(resume, 1, 1, 1, run_of((1, 1, 1)))[0]
    assert rank_pool.run(resume, *layout, run_of(layout, schedule)) == [expected, expected]
