"""Growth in width against dense matrices, in float64: outputs, gradients, Adam moments and steps."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.growth.grow import grow
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support.doubles import logits_and_gradients, random_parameters, read_group
from tests.support.width import CASES, MODELS, MULTIPLES, close, source_of, stage_of, widened


@pytest.mark.parametrize(("name", "multiple"), CASES)
def test_without_noise_every_tensor_is_a_product_with_dense_matrices(name, multiple):
    source = source_of(MODELS[name])
    grown = grow(source, stage_of(multiple, noise=0))
    expected = widened(source.tensors["model"], multiple)
    for tensor, found in read_group(grown).items():
        assert close(found, expected[tensor], 1e-14), tensor


@pytest.mark.parametrize("noise", [0, 0.5])
@pytest.mark.parametrize(("name", "multiple"), CASES)
def test_the_logits_stay_and_gradients_obey_the_chain_rule(name, multiple, noise):
    """The new parameters are a linear function L of the old ones, plus noise: the old gradient is L^T times the new."""
    source = source_of(MODELS[name])
    grown = grow(source, stage_of(multiple, noise=noise))
    logits, gradients = logits_and_gradients(source)
    new_logits, new_gradients = logits_and_gradients(grown)
    assert close(new_logits, logits)
    old = {tensor: values.requires_grad_() for tensor, values in source.tensors["model"].items()}
    made = widened(old, multiple)
    products = [(made[tensor] * gradient).sum() for tensor, gradient in new_gradients.items()]
    through_matrices = torch.autograd.grad(sum(products), list(old.values()))
    for tensor, found in zip(old, through_matrices, strict=True):
        assert close(found, gradients[tensor], 1e-11), tensor
    if noise:
        values = new_gradients["embedding.weight"].chunk(int(2 * multiple), 1)
        assert not close(values[0], values[-1], 0.01)


def noise_of(keys, multiple, name):
    """The noise that growth adds to a tensor, relative to the standard deviation that the stage sets."""
    source = source_of(keys)
    with_noise, without = (read_group(grow(source, stage_of(multiple, noise=noise)))[name] for noise in (0.5, 0))
    std = model_parameters(source.record.model)[name].initial.std
    return (with_noise - without) / (0.5 * std)


@pytest.mark.parametrize(
    ("name", "multiple", "expected"),
    [
        ("layers.0.attention.query.key_tokens", 2, math.sqrt(2)),
        ("layers.1.attention.proj.key_tokens", 3, math.sqrt(2)),
        ("layers.0.ffn.key_tokens", 1.5, 1),
        ("layers.1.ffn.value_tokens", 2, 0),
        ("layers.1.attention.value.value_tokens", 3, 0),
        ("embedding.weight", 1.5, 0),
    ],
)
def test_noise_is_added_to_what_reads_and_has_the_size_of_the_stage(name, multiple, expected):
    noise = noise_of(MODELS["softmax"], multiple, name)
    assert float(noise.square().mean().sqrt()) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("role", ["query", "proj"])
@pytest.mark.parametrize("multiple", MULTIPLES)
def test_copies_of_rows_have_noise_of_their_own(role, multiple):
    noise = noise_of(MODELS["transformer"], multiple, f"layers.0.attention.{role}.weight")
    copies = [copy[:8] for copy in noise.split(16)]  # at 1.5, only the first half has a copy
    for one, other in itertools.combinations(copies, 2):
        assert not close(one, other, 0.5)
    if role == "proj":
        assert sum(copies).abs().max() < 1e-12
        assert not noise[8:16].any() or multiple != 1.5


def test_at_one_and_a_half_only_heads_with_a_copy_get_noise():
    noise = noise_of(MODELS["softmax"], 1.5, "layers.0.attention.proj.key_tokens")
    assert not noise[:, 8:16].any()
    assert close(noise[:, :8], -noise[:, 16:], 1e-10)
    assert noise[:, :8].abs().min() > 0


@pytest.mark.parametrize("multiple", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_adam_moments_are_those_of_the_new_gradients(name, multiple):
    """Moments that are the gradient and its square are so after the growth."""
    source = source_of(MODELS[name], step=5, adam_steps=5)
    gradients = logits_and_gradients(source)[1]
    source.tensors["exp_avg"] = gradients
    source.tensors["exp_avg_sq"] = {tensor: gradient.square() for tensor, gradient in gradients.items()}
    grown = grow(source, stage_of(multiple, noise=0))
    expected = logits_and_gradients(grown)[1]
    for tensor, found in read_group(grown, "exp_avg").items():
        assert close(found, expected[tensor], 1e-11), tensor
    for tensor, found in read_group(grown, "exp_avg_sq").items():
        assert close(found, expected[tensor].square(), 1e-11), tensor


def stepped(checkpoint, gradients):
    """The model after a step of textbook AdamW with tiny epsilon, by the generation of each row."""
    rate, decay, betas = 0.01, 0.1, (0.9, 0.95)
    record = checkpoint.record
    after = {}
    for name, values in read_group(checkpoint).items():
        first = betas[0] * read_group(checkpoint, "exp_avg")[name] + (1 - betas[0]) * gradients[name]
        second = betas[1] * read_group(checkpoint, "exp_avg_sq")[name] + (1 - betas[1]) * gradients[name].square()
        row = 0
        after[name] = values.clone()
        for run in record.all_generations.runs(name, len(values)):
            rows, generation = slice(row, row + run.count), run.generation
            mean = first[rows] / (1 - betas[0] ** (generation.exp_avg_steps + 1))
            variance = second[rows] / (1 - betas[1] ** (generation.exp_avg_sq_steps + 1))
            after[name][rows] *= 1 - rate * decay
            after[name][rows] -= rate * generation.step_scale * mean / (variance.sqrt() + 1e-100)
            row += run.count
        assert row == len(values)
    return after


@pytest.mark.parametrize("multiple", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_growing_commutes_with_a_step_of_adam(name, multiple):
    source = source_of(MODELS[name], step=5, adam_steps=5)
    gradients = logits_and_gradients(source)[1]
    source.tensors["exp_avg"] = random_parameters(source.record.model, 1)
    source.tensors["exp_avg_sq"] = {
        tensor: 0.1 + values.square() for tensor, values in random_parameters(source.record.model, 2).items()
    }
    grown = grow(source, stage_of(multiple, noise=0))
    step_then_grow = widened(stepped(source, gradients), multiple)
    grow_then_step = stepped(grown, logits_and_gradients(grown)[1])
    plain = grow(source, stage_of(multiple, noise=0, step_scale="none"))
    for tensor, expected in step_then_grow.items():
        assert close(grow_then_step[tensor], expected), tensor
    assert plain.record.all_generations.table == source.record.all_generations.table
    name = "final_norm.weight"
    assert not close(stepped(plain, logits_and_gradients(plain)[1])[name], step_then_grow[name], 1e-3)


@pytest.mark.parametrize("name", ["l2_norm_gelu", "transformer untied", "gated"])
def test_one_and_a_half_times_the_width_restarts_adam(name):
    source = source_of(MODELS[name], groups=("model", "exp_avg", "exp_avg_sq"), step=5, adam_steps=5)
    grown = grow(source, stage_of(1.5))
    for group in ("exp_avg", "exp_avg_sq"):
        assert not any(values.any() for values in read_group(grown, group).values())
    table = grown.record.all_generations.table
    assert {(generation.exp_avg_steps, generation.exp_avg_sq_steps) for generation in table} == {(0, 0)}
    assert {generation.step_scale for generation in table} == {1, 2 / 3}
    assert grown.record.training == replace(source.record.training, adam_steps=0)


@pytest.mark.parametrize(("name", "multiple"), CASES)
def test_width_tokens_and_layers_grow_in_one_stage(name, multiple):
    keys = MODELS[name]
    more = {"ffn_tokens": 40, "init": "duplicate"}
    if keys.get("layer") == "transformer":
        more = {"ffn_tokens": 40, "mlp_init": "duplicate"}
    source = source_of(keys, groups=("model", "exp_avg", "exp_avg_sq"), step=3, adam_steps=3)
    grown = grow(source, stage_of(multiple, num_layers=3, layer_init="copy_zero", noise=0.3, **more))
    assert close(logits_and_gradients(grown)[0], logits_and_gradients(source)[0])
    (event,) = grown.record.lineage
    assert event.kinds["ffn"] == [20, 40]
    assert event.inserted_layers == [1]
    assert event.to_json()["hidden_size"] == [16, int(16 * multiple)]
    assert grown.record.model.num_attention_heads == 4 * multiple


@pytest.mark.parametrize(("name", "multiple"), CASES)
def test_in_fp32_the_logits_stay_within_rounding_and_powers_of_two_keep_every_bit(name, multiple):
    source = source_of(MODELS[name])
    single = {tensor: values.float() for tensor, values in source.tensors["model"].items()}
    source.tensors["model"] = single
    logits = logits_and_gradients(source)[0]
    assert close(logits_and_gradients(grow(source, stage_of(multiple)))[0], logits, 1e-5)
    if multiple == 2:
        expected = widened({tensor: values.double() for tensor, values in single.items()}, 2)
        expected["final_norm.weight"] = single["final_norm.weight"].double().repeat(2) / 2
        for tensor, found in read_group(grow(source, stage_of(2, noise=0))).items():
            assert torch.equal(found.double(), expected[tensor]), tensor


def test_one_and_a_half_times_the_width_is_refused_where_norms_have_weights_in_the_blocks():
    with pytest.raises(CheckpointError, match=r"hidden_multiple=1.5 mixes channels.*use an integer"):
        grow(source_of(MODELS["strong"]), stage_of(1.5))
