"""Every layout trains the same model: losses, gradient norms and each gradient against one process."""

import numpy as np
import pytest
import torch

from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss
from tests.support.layouts import CASES, layout_config, whole_model
from tests.support.training import EOD, PLAIN, random_batch, training_run

STEPS = 6
FAST = {"lr": 1e-2}
"""A learning rate at which a few steps show."""
FP64 = {"precision": "fp64"}
"""Differences of rounding grow at that rate: in fp32, gradient norms are 1e-4 apart after six steps on some CPUs."""
UNTIED = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def runs(rank_pool):
    """(layout, sequence parallel, untied) -> (loss curve [STEPS, 2], whole gradients of step 0), run once each."""
    known = {}

    def run(layout, sequence_parallel, untied):
        key = layout, sequence_parallel, untied
        if key not in known:
            config = layout_config(*key, optimizer=FAST, training=FP64)
            answers = rank_pool.run(training_run, *layout, config, STEPS)
            assert all(curve == answers[0][0] for curve, _ in answers), "ranks disagree on the loss"
            known[key] = np.array(answers[0][0]), whole_model(layout, untied, [grads for _, grads in answers])
        return known[key]

    return run


@UNTIED
@pytest.mark.parametrize("layout, sequence_parallel", CASES)
def test_layout_equals_one_process(runs, layout, sequence_parallel, untied):
    reference, expected = runs((1, 1, 1), False, untied)
    curve, gradients = runs(layout, sequence_parallel, untied)
    assert reference[-1, 0] < reference[0, 0] - 0.1, "the model must learn for the curve to say anything"
    assert (reference[:, 1] > 0.5).all(), "clipping must be active"
    np.testing.assert_allclose(curve, reference, rtol=1e-9)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = np.linalg.norm(gradient - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-12, (name, error)


@pytest.mark.parametrize("layout, sequence_parallel", [((2, 1, 1), False), ((1, 2, 2), False), ((2, 2, 2), True)])
def test_layout_equals_one_process_in_fp32(rank_pool, layout, sequence_parallel):
    reference, expected = rank_pool.run(training_run, 1, 1, 1, layout_config((1, 1, 1), untied=True), 3)[0]
    answers = rank_pool.run(training_run, *layout, layout_config(layout, sequence_parallel, untied=True), 3)
    np.testing.assert_allclose(answers[0][0], reference, rtol=1e-5)
    for name, gradient in whole_model(layout, True, [gradients for _, gradients in answers]).items():
        assert np.linalg.norm(gradient - expected[name]) < 1e-5 * np.linalg.norm(expected[name]), name


@pytest.mark.parametrize("layout, sequence_parallel", [case for case in CASES if case[0][1] == 1])
def test_bits_do_not_depend_on_pipeline_stages(runs, layout, sequence_parallel):
    tensor, _, data = layout
    one_stage, _ = runs((tensor, 1, data), sequence_parallel, True)
    two_stages, _ = runs((tensor, 2, data), sequence_parallel, True)
    assert np.array_equal(one_stage, two_stages)


DOCUMENTS = {"eod_mask_loss": True, "reset_attention_mask": True}


@pytest.mark.parametrize("layout, sequence_parallel", [((2, 1, 1), True), ((1, 2, 1), False), ((2, 2, 2), True)])
def test_documents_apart_on_any_layout(rank_pool, layout, sequence_parallel):
    """Every stage learns where documents begin, and the mean is over the targets of all replicas that count."""
    curve, expected = rank_pool.run(training_run, 1, 1, 1, layout_config((1, 1, 1), untied=True, data=DOCUMENTS), 4)[0]
    plain, _ = rank_pool.run(training_run, 1, 1, 1, layout_config((1, 1, 1), untied=True), 4)[0]
    assert abs(curve[0][0] - plain[0][0]) > 1e-5
    config = layout_config(layout, sequence_parallel, untied=True, data=DOCUMENTS)
    answers = rank_pool.run(training_run, *layout, config, 4)
    np.testing.assert_allclose(np.array(answers[0][0])[:, 0], np.array(curve)[:, 0], rtol=1e-5)
    for name, gradient in whole_model(layout, True, [gradients for _, gradients in answers]).items():
        assert np.linalg.norm(gradient - expected[name]) < 1e-5 * np.linalg.norm(expected[name]), name


def direct_loss(mesh, config):
    """(loss as evaluated, mean of torch's cross-entropy over what does not follow an end of document)."""
    state, batch = build_state(config, mesh), random_batch(config, 0, mesh)
    ids = batch.ids.flatten(0, 1)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    options = {key: getattr(batch, key).flatten(0, 1) for key in ("document_starts", "document_lengths")}
    with torch.no_grad():
        logits = state.model(inputs, **options).transpose(0, 1)
    counts = inputs != EOD
    expected = torch.nn.functional.cross_entropy(logits[counts], targets[counts])
    return evaluation_loss(state, batch), float(expected), int((~counts).sum())


def test_the_loss_is_a_mean_over_targets_that_count(rank_pool):
    loss, expected, ignored = rank_pool.run(direct_loss, 1, 1, 1, layout_config((1, 1, 1), data=DOCUMENTS))[0]
    assert ignored > 0
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages, micro_batches", [(3, 5), (4, 8)])
def test_schedules_with_uneven_layers(rank_pool, schedule, stages, micro_batches):
    sections = {"model": {"num_layers": 5}, "training": {"micro_batch_size": 1, "global_batch_size": micro_batches}}
    reference = rank_pool.run(training_run, 1, 1, 1, layout_config((1, 1, 1), untied=True, **sections), 3)[0][0]
    config = layout_config((1, stages, 1), untied=True, schedule=schedule, **sections)
    for curve, _ in rank_pool.run(training_run, 1, stages, 1, config, 3):
        assert curve == reference


@pytest.mark.parametrize("layout, sequence_parallel", [((2, 1, 1), False), ((2, 2, 1), True), ((2, 1, 2), True)])
def test_the_plain_transformer_trains_the_same_on_any_layout(rank_pool, layout, sequence_parallel):
    alone = layout_config((1, 1, 1), model=dict(PLAIN), optimizer=FAST)
    expected = rank_pool.run(training_run, 1, 1, 1, alone, STEPS)[0][0]
    config = layout_config(layout, sequence_parallel, model=dict(PLAIN), optimizer=FAST)
    curve = rank_pool.run(training_run, *layout, config, STEPS)[0][0]
    assert expected[-1][0] < expected[0][0] - 0.1
    np.testing.assert_allclose(np.array(curve)[:, 0], np.array(expected)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(np.array(curve)[:, 1], np.array(expected)[:, 1], rtol=1e-4)


@pytest.mark.parametrize("granularity", ["selective", "full"])
@pytest.mark.parametrize("layout", [(2, 2, 1), (2, 1, 2)], ids=str)
def test_recomputation_changes_no_bit_on_ranks(rank_pool, layout, granularity):
    plain, recomputed = (
        rank_pool.run(training_run, *layout, layout_config(layout, True, training={"recompute_granularity": kind}), 3)
        for kind in ("none", granularity)
    )
    for (curve, gradients), (other_curve, other_gradients) in zip(plain, recomputed, strict=True):
        assert curve == other_curve
        assert all(np.array_equal(gradient, other_gradients[name]) for name, gradient in gradients.items())
