"""After an exact growth the gradients obey the chain rule and Adam's moments follow them, from autograd in float64.

The moments of a checkpoint are set to its gradient and its square. Growth must map them to those of the grown model.
"""

import pytest
import torch

from megatron_tf.config import GrowthStage, ModelConfig, layer_sources
from megatron_tf.growth.grow import grow
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support.grown_models import TRANSFORMER, MemoryCheckpoint, gradients_of, random_checkpoint, read, tokenformer

MODELS = {
    norm: tokenformer(norm_activation=norm, untie_embeddings_and_output_weights=norm == "gelu_l2_norm")
    for norm in ("l2_norm_gelu", "gelu_l2_norm", "softmax")
} | {"transformer": ModelConfig(**TRANSFORMER)}
LAYERS = {
    "same layers": {},
    "identity": {"num_layers": 5},
    "copy_zero": {"insert_layers": [0, 2, 3], "layer_init": "copy_zero"},
}
KINDS = ("qkv", "proj", "ffn")
ZEROS = {"qkv_tokens": 31, "proj_tokens": 28, "ffn_tokens": 41}
TRIPLED = {"qkv_tokens": 72, "proj_tokens": 60, "ffn_tokens": 96}


def growth(model, rows, *, layers, noise=0.0):
    """Return the stage that adds zero keys or zero values, or makes three copies of each token."""
    counts = ZEROS if rows.startswith("zero") else TRIPLED
    keys = {f"{kind}_tokens": counts[f"{kind}_tokens"] for kind in model.token_kinds}
    key = "init" if model.layer == "tokenformer" else "mlp_init"
    return GrowthStage(**keys, **{key: rows}, noise=noise, **LAYERS[layers])


def checkpoint_with_gradients(model):
    """Return a checkpoint whose Adam moments are its gradient and the square of that."""
    source = random_checkpoint(model)
    gradients = gradients_of(source)
    source.tensors["exp_avg"] = gradients
    source.tensors["exp_avg_sq"] = {name: gradient.square() for name, gradient in gradients.items()}
    return source, gradients


def origins(source, grown, stage):
    """Yield (parameter of the grown model, the one in the old model, whether its layer is new)."""
    old = model_parameters(source.record.model)
    layers = layer_sources(source.record.model.num_layers, stage)
    for name, parameter in model_parameters(grown.record.model).items():
        if parameter.layer is None:
            yield parameter, old[name], False
        else:
            layer = layers[parameter.layer]
            yield parameter, old[parameter.name_in_layer(layer.layer)], layer.is_new


def assert_close(new, old):
    torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-12 * float(old.abs().max()))


CASES = [
    (name, rows, layers)
    for name in MODELS
    for rows in ("zero_key", "duplicate", *(["zero_value"] if name == "transformer" else []))
    for layers in LAYERS
    if (name, rows) != ("softmax", "zero_key")
]


@pytest.mark.parametrize(("name", "rows", "layers"), CASES)
def test_gradients_obey_the_chain_rule_and_the_moments_are_theirs(name, rows, layers):
    """The sum over copies of factor times gradient is the old gradient; a key is copied as it is, a value divided."""
    model = MODELS[name]
    stage = growth(model, rows, layers=layers)
    source, old_gradients = checkpoint_with_gradients(model)
    grown = read(grow(source, stage))
    gradients = gradients_of(grown)
    for parameter, old, is_new in origins(source, grown, stage):
        if is_new:
            continue
        count = old.shape[0]
        gradient, old_gradient = gradients[parameter.name], old_gradients[old.name]
        copies = gradient.shape[0] // count if rows == "duplicate" else 1
        factor = 1 / copies if parameter.writes_output else 1.0
        kept = gradient[: copies * count].unflatten(0, (copies, count))
        assert_close((factor * kept).sum(0), old_gradient)
        first, second = (grown.tensors[group][parameter.name] for group in ("exp_avg", "exp_avg_sq"))
        assert_close(first[: copies * count], kept.flatten(0, 1))
        assert_close(second[: copies * count], kept.flatten(0, 1).square())
        assert not first[copies * count :].any()
        assert not second[copies * count :].any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layers", LAYERS)
def test_with_noise_copies_have_different_gradients_of_their_keys_that_add_up_to_the_old_ones(name, layers):
    model = MODELS[name]
    stage = growth(model, "duplicate", layers=layers, noise=0.5)
    source, old_gradients = checkpoint_with_gradients(model)
    grown = grow(source, stage)
    gradients = gradients_of(grown)
    for parameter, old, is_new in origins(source, grown, stage):
        copies = parameter.shape[0] // old.shape[0]
        if is_new or copies == 1:
            continue
        kept = gradients[parameter.name].unflatten(0, (copies, -1))
        if parameter.writes_output:
            assert_close(kept, old_gradients[old.name].expand_as(kept))
        else:
            assert_close(kept.sum(0), old_gradients[old.name])
            assert (kept[0] - kept[1]).norm() > 0.01 * kept[0].norm()


@pytest.mark.parametrize("rows", ["zero_key", "zero_value", "rotated_key"])
def test_every_new_row_is_trained_from_the_first_step_on(rows):
    """Either its key or its value has a gradient: where one is zero, the other is not."""
    model = MODELS["transformer" if rows == "zero_value" else "l2_norm_gelu"]
    stage = growth(model, rows, layers="same layers")
    source = random_checkpoint(model)
    grown = grow(source, stage)
    gradients = gradients_of(grown)
    for parameter, old, _ in origins(source, grown, stage):
        if parameter.has_units and parameter.shape != old.shape:
            new = gradients[parameter.name][old.shape[0] :]
            if parameter.writes_output == (rows != "zero_key"):
                assert (new.abs().amax(1) > 0).all()
            elif rows != "rotated_key":  # rotated keys have a gradient, too: they change the norm of the rows
                assert not new.any()


def test_gradients_of_rotated_keys_obey_the_chain_rule():
    """K' = [K; Q K] takes the gradient dK + Q^T dK_new back to K; values do not change, nor does their gradient."""
    model = MODELS["l2_norm_gelu"]
    source, old_gradients = checkpoint_with_gradients(model)
    grown = grow(source, growth(model, "rotated_key", layers="same layers"))
    gradients = gradients_of(grown)
    for name, parameter in model_parameters(model).items():
        count, gradient = parameter.shape[0], gradients[name]
        if not parameter.has_units:
            assert_close(gradient, old_gradients[name])
        elif parameter.writes_output:
            assert_close(gradient[:count], old_gradients[name])
        else:
            assert (gradient[count:].abs().amax(1) > 0).all()
            total = gradient[:count].clone()
            for number, rotation in enumerate(grown.recipes["model"][name].segments[1:], 1):
                matrix = matrix_of(rotation)
                total += matrix.t() @ gradient[number * count : (number + 1) * count]
            assert_close(total, old_gradients[name])


def matrix_of(rotation):
    """The matrix Q of rotated rows: what it makes of the rows of the identity."""
    count = len(rotation)
    identity = MemoryCheckpoint({"model": {rotation.name: torch.eye(count, dtype=torch.float64)}}, record=None)
    matrix = torch.empty(count, count, dtype=torch.float64)
    rotation.read(identity, "model", low=0, high=count, out=matrix)
    return matrix


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer_init", ["identity", "copy_zero"])
def test_the_last_values_of_a_new_layer_have_the_only_gradients_in_it(name, layer_init):
    source = random_checkpoint(MODELS[name])
    stage = GrowthStage(num_layers=5, layer_init=layer_init)
    grown = grow(source, stage)
    gradients = gradients_of(grown)
    seen = 0
    for parameter, _, is_new in origins(source, grown, stage):
        if is_new:
            seen += 1
            assert bool(gradients[parameter.name].any()) == parameter.ends_branch
    assert seen == 2 * len([p for p in model_parameters(MODELS[name]).values() if p.layer == 0])
