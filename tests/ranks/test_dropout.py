"""Dropout on ranks: the same where activations are replicated, another where they are sharded; no layout matters."""

import numpy as np
import pytest
import torch

from megatron_tf.layers.dropout import Dropout
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.layouts import layout_config
from tests.support.training import random_batch

CASES = [((2, 1, 1), False), ((2, 1, 1), True), ((1, 2, 1), False), ((1, 1, 2), False)]


def curve(mesh, config):
    """[(loss, gradient norm)] of four steps."""
    state = build_state(config, mesh)
    results = [train_step(state, random_batch(config, step, mesh, 8 * step), 1e-3) for step in range(4)]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("key", ["hidden_dropout", "attention_dropout"])
@pytest.mark.parametrize(("layout", "sequence_parallel"), CASES, ids=str)
def test_dropout_is_the_same_on_any_layout(rank_pool, layout, sequence_parallel, key):
    training = {key: 0.2}
    reference = rank_pool.run(curve, 1, 1, 1, layout_config((1, 1, 1), training=training | {"micro_batch_size": 4}))[0]
    found = rank_pool.run(curve, *layout, layout_config(layout, sequence_parallel, training=training))
    assert all(answer == found[0] for answer in found)
    np.testing.assert_allclose(np.array(found[0])[:, 0], np.array(reference)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(np.array(found[0])[:, 1], np.array(reference)[:, 1], rtol=1e-4)


def masks(mesh):
    """(what is dropped where the sequence is whole, where it is sharded, of this rank's heads)."""
    make = Dropout(hidden_rate=0.5, attention_rate=0.5, seed=1, layer=2).of_samples
    samples, group, ranks = torch.tensor([3, 4]), mesh.group("tp"), mesh.size("tp")
    dropout = make(samples, positions=torch.arange(8), heads=4, group=group, sequence_parallel=False)
    whole = dropout.hidden(torch.ones(8, 2, 16), "ffn")
    sharded = make(samples, positions=torch.arange(8), heads=4, group=group, sequence_parallel=True)
    part = sharded.hidden(torch.ones(8 // ranks, 2, 16), "ffn")
    heads = torch.ones(8, 2, 4 // ranks, 4)
    return whole.numpy(), part.numpy(), dropout.attend(heads, heads, heads).numpy()


def test_masks_agree_where_activations_are_replicated_and_differ_where_they_are_sharded(rank_pool):
    ((expected, _, expected_heads),) = rank_pool.run(masks, 1, 1, 1)
    wholes, parts, heads = zip(*rank_pool.run(masks, 2, 1, 1), strict=True)
    assert all(np.array_equal(whole, expected) for whole in wholes)
    assert np.array_equal(np.concatenate(parts), expected)
    assert not np.array_equal(*parts)
    assert np.array_equal(np.concatenate(heads, 2), expected_heads)
    assert not np.array_equal(*heads)
