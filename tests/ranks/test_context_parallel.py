"""Context-parallel ranks share each sequence, and train what one process does: losses, norms and every gradient."""

import numpy as np
import pytest

from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss, train_step
from tests.support.grown_training import growing_run, train_and_grow
from tests.support.layouts import layout_config, whole_model
from tests.support.training import random_batch, training_run

STEPS = 3
FP64 = {"precision": "fp64", "seq_length": 32}
DOCUMENTS = {"data": {"eod_mask_loss": True, "reset_attention_mask": True}}
SHARDED = {"parallel": {"sequence_parallel": True}}
CASES = {
    "ring of 4, documents, hidden dropout": (4, "ring", (1, 1, 1), {**DOCUMENTS, "training": {"hidden_dropout": 0.2}}),
    "ring of 2 x tensor 2 x data 2, documents, one copy for each replica": (
        *(2, "ring", (2, 1, 2)),
        {**DOCUMENTS, "parallel": {"sequence_parallel": True, "data_parallel_shard_size": 1}},
    ),
    "ring of 4 x pipeline 2, recomputed": (
        *(4, "ring", (1, 2, 1)),
        {"training": {"recompute_granularity": "full"}, "model": {"untie_embeddings_and_output_weights": True}},
    ),
    "ring of 2 x pipeline 2, backward in two halves": (
        *(2, "ring", (1, 2, 1)),
        {**DOCUMENTS, "model": {"num_layers": 4}, "schedule": "zbv"},
    ),
    "all-to-all of 4 x data 2, documents": (4, "all_to_all", (1, 1, 2), DOCUMENTS),
    "all-to-all of 2 x tensor 2 x pipeline 2, hidden dropout": (
        *(2, "all_to_all", (2, 2, 1)),
        {**SHARDED, "training": {"hidden_dropout": 0.2}},
    ),
}


def context_config(layout, context, method, **sections):
    """Configure the small run on a layout (tensor, pipeline, data) and this many context-parallel ranks."""
    keys = {"context_parallel_size": context, "context_parallel_method": method}
    return layout_config(layout, **sections | {"parallel": keys | sections.get("parallel", {})})


def results(mesh, config):
    """(losses and norms of the first steps, whole gradients of the first one, loss of an evaluation before them)."""
    evaluated = evaluation_loss(build_state(config, mesh), random_batch(config, 0, mesh))
    return *training_run(mesh, config, STEPS), evaluated


@pytest.mark.parametrize(("context", "method", "layout", "sections"), CASES.values(), ids=CASES)
def test_it_trains_what_one_process_does(rank_pool, context, method, layout, sections):
    sections = {**sections, "training": FP64 | sections.get("training", {})}
    config = context_config(layout, context, method, **sections)
    shard_size = config.parallel.data_parallel_shard_size
    found = rank_pool.run(results, *layout, config, context=context, shard_size=shard_size)

    alone = {name: keys for name, keys in sections.items() if name not in ("parallel", "schedule")}
    ((expected, gradients, evaluated),) = rank_pool.run(results, 1, 1, 1, layout_config((1, 1, 1), **alone))
    assert expected[-1][0] < expected[0][0] - 0.005, "the model must learn for the losses to say anything"
    for curve, _, loss in found:
        np.testing.assert_allclose(curve, expected, rtol=1e-9)
        assert loss == pytest.approx(evaluated, rel=1e-9)
    for name, gradient in whole_model(layout, "head.weight" in gradients, [each for _, each, _ in found]).items():
        error = np.linalg.norm(gradient - gradients[name]) / np.linalg.norm(gradients[name])
        assert error < 1e-9, (name, error)


@pytest.mark.parametrize(("context", "method"), [(4, "ring"), (2, "all_to_all")], ids=str)
def test_in_16_bits_it_is_as_near_to_fp64_as_one_process(rank_pool, context, method):
    """The first gradients of a run in bf16, on ranks and in one process, against those in fp64."""
    wide, narrow = ({**DOCUMENTS, "training": FP64 | {"precision": precision}} for precision in ("fp64", "bf16"))
    ((_, exact, _),) = rank_pool.run(results, 1, 1, 1, layout_config((1, 1, 1), **wide))
    ((losses, alone, _),) = rank_pool.run(results, 1, 1, 1, layout_config((1, 1, 1), **narrow))
    config = context_config((1, 1, 1), context, method, **narrow)
    found = rank_pool.run(results, 1, 1, 1, config, context=context)
    for curve, _, _ in found:
        np.testing.assert_allclose(np.array(curve)[:, 0], np.array(losses)[:, 0], rtol=2e-3)
    for name, gradient in whole_model((1, 1, 1), False, [each for _, each, _ in found]).items():
        size = np.linalg.norm(exact[name])
        error, error_alone = (np.linalg.norm(each - exact[name]) / size for each in (gradient, alone[name]))
        assert error < 1.5 * error_alone + 1e-3, (name, error, error_alone)
        assert error < 0.1, (name, error)


def grown_losses(mesh, config):
    """The losses of a run that is saved, grows, and is restored from that checkpoint: [stage, step]."""
    _, before, _, after = train_and_grow(config, mesh, 4)
    return [before[-1], after[-1]]


def test_it_grows_from_its_checkpoint_as_one_process_does(rank_pool, tmp_path):
    growth = {"at_step": 2, "ffn_tokens": 96, "num_layers": 4, "layer_init": "copy_zero"}
    config = context_config((1, 1, 2), 2, "ring", training=FP64)
    found = rank_pool.run(grown_losses, 1, 1, 2, growing_run(config, tmp_path / "ranks", [growth]), context=2)
    alone = growing_run(layout_config((1, 1, 1), training=FP64), tmp_path / "alone", [growth])
    (expected,) = rank_pool.run(grown_losses, 1, 1, 1, alone)
    assert np.shape(expected) == (2, 2)
    for losses in found:
        np.testing.assert_allclose(losses, expected, rtol=1e-9)


LONG = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
    "training": {"seq_length": 32_768, "micro_batch_size": 1, "global_batch_size": 1},
}


def step_result(mesh, config):
    """(loss, norms of the gradients) of one step."""
    result = train_step(build_state(config, mesh), random_batch(config, 0, mesh), 1e-3)
    return result.loss, *result.norms.values()


@pytest.mark.slow
def test_sequences_of_32768_tokens_on_four_ranks(rank_pool):
    (expected,) = rank_pool.run(step_result, 1, 1, 1, layout_config((1, 1, 1), **LONG))
    found = rank_pool.run(step_result, 1, 1, 1, context_config((1, 1, 1), 4, "ring", **LONG), context=4)
    assert all(each == found[0] for each in found)
    assert found[0] == pytest.approx(expected, rel=1e-4)
