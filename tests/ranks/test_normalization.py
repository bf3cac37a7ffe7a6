"""The loss is a mean over the targets of a step, however they are spread over micro-batches and replicas."""

import pytest
import torch
import torch.nn.functional as F

from megatron_tf.data.batch import DocumentMasking, make_batch
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss, forward_backward, mean_over_replicas, train_step
from tests.support.layouts import layout_config, whole_model
from tests.support.training import EOD, VOCAB, whole_gradients

IGNORED = [0, 15, 3, 16, 1, 8, 2, 16]
"""Of the 16 targets of each sample of the global batch; two micro-batches of one sample have none that counts."""
MASKED = {"eod_mask_loss": True, "reset_attention_mask": True}


def uneven_batch(config, mesh, numbers_ignored=IGNORED):
    """This replica's part of a global batch whose samples have that many targets to ignore."""
    ids = torch.randint(EOD, (len(numbers_ignored), 17), generator=torch.Generator().manual_seed(1))
    for sample, ignored in zip(ids, numbers_ignored, strict=True):
        sample[:ignored] = EOD
        sample[16] = VOCAB - 1
    numbers = torch.arange(len(IGNORED))
    ids, numbers = (
        values.unflatten(0, (-1, mesh.size("dp"), config.training.micro_batch_size))[:, mesh.rank("dp")].numpy()
        for values in (ids, numbers)
    )
    return make_batch(ids, numbers, DocumentMasking(EOD, mask_loss=True, reset_attention=True))


def step_of_ranks(mesh, config):
    """(loss trained on, loss evaluated, whole gradients of this rank's stage)."""
    state, batch = build_state(config, mesh), uneven_batch(config, mesh)
    evaluated = evaluation_loss(state, batch)
    loss = mean_over_replicas(forward_backward(state, batch), mesh)
    return loss, evaluated, whole_gradients(state)


def plain_formula(mesh, config):
    """(mean loss of the targets that count, its gradients), by torch's own cross-entropy and autograd."""
    state, batch = build_state(config, mesh), uneven_batch(config, mesh)
    ids = batch.ids.flatten(0, 1)
    options = {key: getattr(batch, key).flatten(0, 1) for key in ("document_starts", "document_lengths")}
    counts = ids[:, :-1] != EOD
    logits = state.model(ids[:, :-1], **options).transpose(0, 1)
    loss = F.cross_entropy(logits[counts], ids[:, 1:][counts])
    loss.backward()
    return loss.item(), whole_gradients(state)


CASES = [((1, 1, 1), 1, "1f1b"), ((1, 1, 4), 1, "1f1b"), ((1, 2, 2), 1, "1f1b"), ((1, 2, 2), 2, "gpipe")]


@pytest.mark.parametrize(("layout", "size", "schedule"), CASES, ids=str)
def test_uneven_targets_give_the_mean_over_all_of_them(rank_pool, layout, size, schedule):
    alone = layout_config((1, 1, 1), untied=True, training={"precision": "fp64"}, data=MASKED)
    expected_loss, expected = rank_pool.run(plain_formula, 1, 1, 1, alone)[0]
    training = {"micro_batch_size": size, "precision": "fp64"}
    config = layout_config(layout, untied=True, schedule=schedule, training=training, data=MASKED)
    answers = rank_pool.run(step_of_ranks, *layout, config)
    for loss, evaluated, _ in answers:
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert evaluated == pytest.approx(expected_loss, rel=1e-12)
    gradients = whole_model(layout, True, [gradients for _, _, gradients in answers])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == "float64"
        assert abs(gradient - expected[name]).max() < 1e-12 * abs(expected[name]).max(), name


def step_without_targets(mesh, config):
    """(loss trained on, gradient norm, loss evaluated) of a global batch in which no target counts."""
    state, batch = build_state(config, mesh), uneven_batch(config, mesh, [16] * len(IGNORED))
    evaluated = evaluation_loss(state, batch)
    result = train_step(state, batch, config.optimizer.lr)
    return result.loss, result.grad_norm, evaluated


@pytest.mark.parametrize(
    ("layout", "schedule"), [((1, 1, 1), "1f1b"), ((2, 1, 2), "1f1b"), ((1, 2, 2), "gpipe")], ids=str
)
def test_a_batch_without_targets_has_no_loss_and_no_gradients(rank_pool, layout, schedule):
    config = layout_config(layout, untied=True, schedule=schedule, training={"micro_batch_size": 1}, data=MASKED)
    assert rank_pool.run(step_without_targets, *layout, config) == [(0.0, 0.0, 0.0)] * layout[0] * layout[1] * layout[2]
