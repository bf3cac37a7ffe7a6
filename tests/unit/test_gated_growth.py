"""Growth of plain transformers with a gated MLP, RMSNorm and QK-norm, in float64: outputs, gradients, Adam moments."""

import pytest
import torch

from megatron_tf.config import GrowthStage, ModelConfig
from megatron_tf.growth.grow import grow
from tests.support.doubles import (
    STRONG,
    TRANSFORMER,
    checkpoint_of,
    logits_and_gradients,
    random_parameters,
    read_group,
)

MODELS = {"gated": {**TRANSFORMER, "mlp": "swiglu"}, "strong": STRONG}
UNITS = {
    "zero_key": {"ffn_tokens": 33},
    "zero_value": {"ffn_tokens": 33, "mlp_init": "zero_value"},
    "duplicate": {"ffn_tokens": 40, "mlp_init": "duplicate", "noise": 0.5},
    "duplicate and zero keys": {"ffn_tokens": 43, "mlp_init": "duplicate", "noise": 0.5},
    "by layer": {"ffn_tokens": {"1": 29}},
}
LAYERS = {
    "identity": {"insert_layers": [0, 1, 2]},
    "copy_zero": {"num_layers": 5, "layer_order": "stacked", "layer_init": "copy_zero"},
    "identity with more units": {"insert_layers": [1], "ffn_tokens": 24},
}
MLP = ("gate", "up", "down")


def source_of(name, groups=("model",), **counters):
    config = ModelConfig(**MODELS[name])
    return checkpoint_of(
        config, {group: random_parameters(config, seed) for seed, group in enumerate(groups)}, **counters
    )


def close(found, expected, relative):
    return float((found - expected).abs().max()) <= relative * float(expected.abs().max())


@pytest.mark.parametrize("stage", [*UNITS, *LAYERS])
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_stay(name, stage):
    source = source_of(name)
    grown = grow(source, GrowthStage(**(UNITS | LAYERS)[stage]))
    assert grown.record.model != source.record.model
    assert close(logits_and_gradients(grown)[0], logits_and_gradients(source)[0], 1e-12)


def new_gradients(checkpoint):
    """The largest gradient of the new units of layer 0, for each factor of its MLP."""
    gradients = logits_and_gradients(checkpoint)[1]
    return {factor: float(gradients[f"layers.0.ffn.{factor}.weight"][20:].abs().max()) for factor in MLP}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("init", "first"), [("zero_key", "up"), ("zero_value", "down")])
def test_new_units_learn_one_factor_at_the_first_step_and_all_at_the_second(name, init, first):
    """Only the factor that starts as zero has a gradient; a step of it gives the others theirs."""
    grown = grow(source_of(name), GrowthStage(**UNITS[init]))
    found = new_gradients(grown)
    assert found.pop(first) > 1e-4
    assert set(found.values()) == {0}
    tensors, gradients = read_group(grown), logits_and_gradients(grown)[1]
    for tensor, values in tensors.items():
        values -= 1e-3 * gradients[tensor].sign()  # the first step of Adam
    assert min(new_gradients(checkpoint_of(grown.record.model, {"model": tensors})).values()) > 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_moments_of_duplicates_are_those_of_their_gradients(name):
    """Moments that are the gradient and its square are so after the growth."""
    source = source_of(name, step=5, adam_steps=5)
    gradients = logits_and_gradients(source)[1]
    source.tensors["exp_avg"] = gradients
    source.tensors["exp_avg_sq"] = {tensor: gradient.square() for tensor, gradient in gradients.items()}
    grown = grow(source, GrowthStage(ffn_tokens=60, mlp_init="duplicate", noise=0))
    expected = logits_and_gradients(grown)[1]
    first, second = read_group(grown, "exp_avg"), read_group(grown, "exp_avg_sq")
    for tensor, gradient in expected.items():
        assert close(first[tensor], gradient, 1e-11), tensor
        assert close(second[tensor], gradient.square(), 1e-11), tensor


def test_new_layers_start_with_the_norms_of_a_new_model_or_copies():
    source = source_of("strong")
    identity = read_group(grow(source, GrowthStage(insert_layers=[1])))
    copied = read_group(grow(source, GrowthStage(insert_layers=[1], layer_init="copy_zero")))
    norms = ["attention_norm", "attention.query_norm", "attention.key_norm", "ffn_norm"]
    for norm in norms:
        assert torch.equal(identity[f"layers.1.{norm}.weight"], torch.ones_like(identity[f"layers.1.{norm}.weight"]))
        assert torch.equal(copied[f"layers.1.{norm}.weight"], source.tensors["model"][f"layers.1.{norm}.weight"])
    for tensors in (identity, copied):
        for last in ("attention.proj", "ffn.down"):
            assert not tensors[f"layers.1.{last}.weight"].any()
        for other in ("attention.query", "ffn.gate", "ffn.up"):
            assert tensors[f"layers.1.{other}.weight"].abs().min(1).values.max() > 0
