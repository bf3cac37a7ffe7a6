"""Dropout: what it drops, where it differs and agrees, and that nothing else remembers it."""

import pytest
import torch

from megatron_tf.config import ConfigError
from megatron_tf.layers.attention import LinearAttention
from megatron_tf.layers.dropout import Dropout
from megatron_tf.layers.rotary import rotary_tables
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss, train_step
from tests.support.training import random_batch, small_run

ONE_PROCESS = Mesh(torch.device("cpu"))
BOTH = {"hidden_dropout": 0.2, "attention_dropout": 0.3, "micro_batch_size": 2}


def mask(seed=1, sample=5, layer=0, branch="ffn", rate=0.25):
    dropped = Dropout(hidden_rate=rate, attention_rate=0.0, seed=seed, samples=(sample,), layer=layer).hidden(
        torch.ones(64, 1, 128), branch, None
    )
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}
    return dropped == 0


def test_a_share_is_dropped_and_the_rest_scaled_up():
    assert mask(rate=0.25).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert mask(rate=0.75).double().mean().item() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("change", [{"seed": 2}, {"sample": 6}, {"layer": 1}, {"layer": None}, {"branch": "attention"}])
def test_masks_differ_between_seeds_samples_and_places(change):
    assert torch.equal(mask(), mask())
    both = (mask() & mask(**change)).double().mean().item()
    assert both == pytest.approx(0.25**2, abs=0.02), "masks are independent"


def test_no_dropout_is_no_work():
    x = torch.ones(3, 1, 4)
    assert Dropout(hidden_rate=0.0, attention_rate=0.5, seed=1, samples=(0,)).hidden(x, "ffn", None) is x
    assert build_state(small_run(), ONE_PROCESS).model.dropout is None


def run(positions, disturb=False, **training):
    """Losses, evaluations and last parameters of steps at these positions in the data."""
    config = small_run(training=training)
    state, losses = build_state(config, ONE_PROCESS), []
    for step, position in enumerate(positions):
        if disturb:
            torch.manual_seed(step)
        batch = random_batch(config, step, ONE_PROCESS, position)
        losses.append((evaluation_loss(state, batch), train_step(state, batch, 1e-3).loss))
    return losses, [shard.tensor for shard in state.shards]


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_drops_the_same(granularity):
    losses, parameters = run([0, 8, 16], **BOTH)
    again, others = run([0, 8, 16], recompute_granularity=granularity, **BOTH)
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_what_is_dropped_follows_from_the_position_and_from_nothing_else():
    losses, parameters = run([0, 8, 16], **BOTH)
    state = torch.get_rng_state()
    again, others = run([0, 8, 16], **BOTH)
    assert torch.equal(torch.get_rng_state(), state)
    disturbed, _ = run([0, 8, 16], disturb=True, **BOTH)
    assert losses == again == disturbed
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert run([8, 8, 16], **BOTH)[0][0][1] != losses[0][1]


@pytest.mark.parametrize("key", ["hidden_dropout", "attention_dropout"])
def test_evaluation_drops_nothing(key):
    (with_dropout, trained), (without, plain) = run([0], **{key: 0.2})[0][0], run([0])[0][0]
    assert with_dropout == without
    assert trained != plain


def test_the_gradient_of_attention_with_dropout():
    torch.manual_seed(0)
    layer = LinearAttention(8, 2).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    x, tables = (
        torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True),
        rotary_tables(torch.arange(5)[:, None], 2, 1e4),
    )
    dropout = Dropout(hidden_rate=0.0, attention_rate=0.4, seed=1, samples=(0, 1), layer=0)
    assert torch.autograd.gradcheck(lambda x: layer(x, tables, dropout=dropout), x)
    assert not torch.allclose(layer(x, tables, dropout=dropout), layer(x, tables))


def test_attention_of_another_package_does_not_drop():
    with pytest.raises(ConfigError, match=r"training.attention_dropout needs kernels.attention sdpa, it is flash_attn"):
        small_run(training={"attention_dropout": 0.1}, kernels={"attention": "flash_attn"})
