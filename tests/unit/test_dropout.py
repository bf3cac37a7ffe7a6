"""Dropout: what it drops, where it differs and agrees, and that nothing else remembers it."""

import pytest
import torch

from megatron_tf.config import ConfigError
from megatron_tf.kernels.documents import Documents
from megatron_tf.kernels.dropout import dropped, nth_word
from megatron_tf.layers import dropout as dropout_module
from megatron_tf.layers.attention import LinearAttention
from megatron_tf.layers.dropout import Dropout
from megatron_tf.layers.rotary import rotary_tables
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.initial_values import stream_seed
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss, train_step
from tests.support.training import random_batch, small_run

ONE_PROCESS = Mesh(torch.device("cpu"))
BOTH = {"hidden_dropout": 0.2, "attention_dropout": 0.3, "micro_batch_size": 2}


def dropout_of(samples, *, length, seed=1, layer=0, hidden_rate=0.0, attention_rate=0.0):
    dropout = Dropout(hidden_rate=hidden_rate, attention_rate=attention_rate, seed=seed, layer=layer)
    numbers = torch.tensor(samples)
    return dropout.of_samples(numbers, positions=torch.arange(length), heads=2, group=None, sequence_parallel=False)


def mask(seed=1, sample=5, layer=0, branch="ffn", rate=0.25):
    dropout = dropout_of([sample], length=64, seed=seed, layer=layer, hidden_rate=rate)
    dropped = dropout.hidden(torch.ones(64, 1, 128), branch)
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
    assert Dropout(hidden_rate=0.0, attention_rate=0.5, seed=1).hidden(x, "ffn") is x
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


@pytest.mark.parametrize("fewest", [2, 128], ids=["blocks of queries", "one block"])
def test_the_gradient_of_attention_with_dropout(monkeypatch, fewest):
    monkeypatch.setattr(dropout_module, "_FEWEST_QUERIES", fewest)
    torch.manual_seed(0)
    layer = LinearAttention(8, 2).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    x, tables = (
        torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True),
        rotary_tables(torch.arange(5)[:, None], 2, 1e4),
    )
    dropout = dropout_of([0, 1], length=5, attention_rate=0.4)
    assert torch.autograd.gradcheck(lambda x: layer(x, tables, dropout=dropout), x)
    assert not torch.allclose(layer(x, tables, dropout=dropout), layer(x, tables))


def test_attention_of_another_package_does_not_drop():
    with pytest.raises(
        ConfigError, match=r"training.attention_dropout needs kernels.attention sdpa, but it is flash_attn"
    ):
        small_run(training={"attention_dropout": 0.1}, kernels={"attention": "flash_attn"})


def attention_inputs(length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(length, 2, 2, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    starts = torch.stack([torch.arange(length) // 7 * 7, torch.zeros(length, dtype=torch.int64)])
    return (q, k, v), Documents(starts, torch.empty(0))


@pytest.mark.parametrize("fewest", [1, 128], ids=["blocks of queries", "one block"])
@pytest.mark.parametrize("within_documents", [False, True])
def test_attention_with_dropout_equals_a_dense_mask_and_dropped_weights(monkeypatch, fewest, within_documents):
    monkeypatch.setattr(dropout_module, "_FEWEST_QUERIES", fewest)
    qkv, documents = attention_inputs(37)
    dropout = dropout_of([3, 4], length=37, attention_rate=0.4, layer=2)
    found = dropout.attend(*qkv, documents=documents if within_documents else None)

    q, k, v = (t.permute(1, 2, 0, 3) for t in qkv)
    allowed = torch.ones(37, 37, dtype=torch.bool).tril()
    if within_documents:
        allowed = allowed & (documents.starts[:, None, :, None] == documents.starts[:, None, None, :])
    weights = (q @ k.mT / 2).masked_fill(~allowed, -torch.inf).softmax(-1)
    stream = stream_seed(1, "attention dropout", 2)
    mask = dropped(nth_word(dropout.seeds.attention, stream), 37, 0.4)
    expected = (weights.masked_fill(mask, 0.0) / 0.6) @ v
    torch.testing.assert_close(found, expected.permute(2, 0, 1, 3), rtol=1e-12, atol=1e-12)


def test_attention_with_dropout_in_16_bits_is_rounded_once():
    qkv, documents = attention_inputs(20, torch.bfloat16)
    dropout = dropout_of([3, 4], length=20, attention_rate=0.4)
    found = dropout.attend(*qkv, documents=documents)
    wide = dropout.attend(*(t.double() for t in qkv), documents=documents)
    torch.testing.assert_close(found.double(), wide, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batches_of_any_size_drop_the_same(size):
    training = {"hidden_dropout": 0.2, "attention_dropout": 0.3}
    losses = [loss for (_, loss) in run([0, 8], **training, micro_batch_size=4)[0]]
    assert [loss for (_, loss) in run([0, 8], **training, micro_batch_size=size)[0]] == pytest.approx(losses, rel=1e-5)
