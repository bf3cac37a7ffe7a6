"""Growth by layers, tokens and hidden units keeps the logits, in float64 and in fp32, or is refused with the reason."""

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.config import GrowthStage, ModelConfig, keeps_outputs, token_init
from megatron_tf.growth.grow import grow
from tests.support.grown_models import TRANSFORMER, logits_of, random_checkpoint, relative_difference, tokenformer

NORMS = ["l2_norm_gelu", "gelu_l2_norm", "softmax"]
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
LAYERS = {
    "same layers": {},
    "inserted": {"insert_layers": [0, 1, 1, 3]},
    "interleaved": {"num_layers": 5, "layer_order": "interleaved"},
    "stacked": {"num_layers": 7, "layer_order": "stacked"},
    "middle": {"num_layers": 6, "layer_order": "middle"},
}
LAYER_INITS = {"identity": {}, "copy_zero": {"layer_init": "copy_zero"}}
PLACED = [(layers, init) for layers in LAYERS for init in LAYER_INITS if layers != "same layers" or init == "identity"]
TOKENS = {
    "same tokens": {},
    "auto": {"qkv_tokens": 48, "proj_tokens": 25, "ffn_tokens": {"1": 97}},
    "zero_key": {"init": "zero_key", "qkv_tokens": 33, "proj_tokens": 25, "ffn_tokens": 45},
    "zero_key in some layers": {"init": "zero_key", "qkv_tokens": {"1-2": 27}, "ffn_tokens": {"0": 40}},
    "rotated_key": {"init": "rotated_key", "qkv_tokens": 48, "proj_tokens": 60, "ffn_tokens": 64},
    "rotated_key and a remainder": {"init": "rotated_key", "qkv_tokens": {"0": 75}, "ffn_tokens": 97},
    "duplicate": {"init": "duplicate", "qkv_tokens": 48, "proj_tokens": 60, "ffn_tokens": 64, "noise": 0.5},
    "duplicate in some layers": {"init": "duplicate", "qkv_tokens": {"0": 72, "2": 48}, "noise": 0.5},
    "duplicate and a remainder": {"init": "duplicate", "proj_tokens": 41, "ffn_tokens": 97, "noise": 0.5},
}
UNITS = {
    "same units": {},
    "zero_key": {"ffn_tokens": 45},
    "zero_value": {"ffn_tokens": {"0-1": 45, "2": 64}, "mlp_init": "zero_value"},
    "duplicate": {"ffn_tokens": 96, "mlp_init": "duplicate", "noise": 0.5},
    "duplicate and a remainder": {"ffn_tokens": {"1": 107}, "mlp_init": "duplicate", "noise": 0.5},
}


def growths(all_rows):
    """Every pair of a growth in layers and one in rows, without the one that adds nothing."""
    return [
        (*placed, rows) for placed in PLACED for rows in all_rows if (placed[0], rows[:4]) != ("same layers", "same")
    ]


def stage_of(layers, layer_init, rows):
    return GrowthStage(**LAYERS[layers], **LAYER_INITS[layer_init], **rows)


def assert_logits_stay(model: ModelConfig, stage: GrowthStage) -> None:
    assert keeps_outputs(model, stage)
    for dtype, bound in BOUND.items():
        source = random_checkpoint(model, dtype)
        grown = grow(source, stage)
        assert grown.dtype("model", "embedding.weight") == dtype
        assert relative_difference(logits_of(source), logits_of(grown)) <= bound


@pytest.mark.parametrize(
    ("norm", "tokens", "expected"),
    [
        ("l2_norm_gelu", {"qkv_tokens": 48}, "rotated_key"),
        ("l2_norm_gelu", {"ffn_tokens": {"2": 64}}, "rotated_key"),
        ("l2_norm_gelu", {"qkv_tokens": 47, "proj_tokens": 39, "ffn_tokens": 63}, "zero_key"),
        ("l2_norm_gelu", {"num_layers": 6}, "zero_key"),
        ("gelu_l2_norm", {"qkv_tokens": 48}, "zero_key"),
        ("softmax", {"num_layers": 6}, "zero_key"),
    ],
)
def test_auto_rotates_keys_where_that_is_exact(norm, tokens, expected):
    model = tokenformer(norm_activation=norm)
    assert token_init(model, GrowthStage(**tokens)) == expected
    source = random_checkpoint(model)
    by_default, chosen = (grow(source, GrowthStage(**tokens, **init)) for init in ({}, {"init": expected}))
    assert by_default.record == chosen.record
    assert by_default.record.lineage[-1].init == expected
    for name in chosen.names("model"):
        rows = chosen.shape("model", name)[0]
        assert torch.equal(*(one.read_rows("model", name, start=0, stop=rows) for one in (by_default, chosen)))


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("layers", "layer_init", "tokens"), growths(TOKENS))
def test_the_logits_of_a_tokenformer_stay(layers, layer_init, tokens, norm, untied):
    model = tokenformer(norm_activation=norm, untie_embeddings_and_output_weights=untied)
    stage = stage_of(layers, layer_init, TOKENS[tokens])
    if norm == "softmax" and tokens.startswith(("zero_key", "auto")):
        with pytest.raises(CheckpointError, match=r"each new token adds exp\(0\) = 1 to the sum of every row"):
            grow(random_checkpoint(model), stage)
    elif norm != "l2_norm_gelu" and tokens.startswith("rotated_key"):
        with pytest.raises(CheckpointError, match=f"only norm_activation l2_norm_gelu .* use duplicate with {norm}"):
            grow(random_checkpoint(model), stage)
    elif norm == "softmax" and tokens.endswith("remainder"):
        with pytest.raises(CheckpointError, match=r"only be duplicated exactly to a multiple of its \d+ tokens"):
            grow(random_checkpoint(model), stage)
    else:
        assert_logits_stay(model, stage)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize(("layers", "layer_init", "units"), growths(UNITS))
def test_the_logits_of_a_plain_transformer_stay(layers, layer_init, units, untied):
    model = ModelConfig(**TRANSFORMER, untie_embeddings_and_output_weights=untied)
    assert_logits_stay(model, stage_of(layers, layer_init, UNITS[units]))


@pytest.mark.parametrize("norm", NORMS)
def test_several_growths_keep_the_logits(norm):
    source = random_checkpoint(tokenformer(norm_activation=norm))
    grown = source
    for stage in (
        GrowthStage(num_layers=5, layer_init="copy_zero", init="duplicate", ffn_tokens=64, noise=0.3),
        GrowthStage(insert_layers=[2, 5], init="duplicate", qkv_tokens=72, ffn_tokens={"0": 192}, noise=0.3),
        GrowthStage(num_layers=9, layer_order="middle", layer_init="copy_zero"),
    ):
        grown = grow(grown, stage)
    assert grown.record.model.num_layers == 9
    assert relative_difference(logits_of(source), logits_of(grown)) <= 1e-12


@pytest.mark.parametrize(
    ("keys", "is_exact"),
    [
        ({"num_layers": 5}, True),
        ({"num_layers": 5, "layer_init": "copy_zero"}, True),
        ({"num_layers": 5, "layer_init": "copy"}, False),
        ({"insert_layers": [1], "layer_init": "copy"}, False),
        ({"ffn_tokens": 64, "init": "duplicate"}, True),
        ({"ffn_tokens": 64, "init": "rotated_key"}, True),
        ({"ffn_tokens": 64, "init": "zero_value"}, False),
        ({"ffn_tokens": 64, "init": "random"}, False),
        ({"ffn_tokens": 64, "init": "duplicate_by_utility", "utility_data": "text"}, False),
        ({"num_layers": 5, "init": "random"}, True),
        ({"insert_layers": [1], "ffn_tokens": {"1": 50}, "init": "random"}, True),
        ({"insert_layers": [1], "ffn_tokens": {"2": 50}, "init": "random"}, False),
        ({"insert_layers": [1], "ffn_tokens": {"1": 50}, "init": "random", "layer_init": "copy_zero"}, True),
        ({"ffn_tokens": 64, "shrink_factor": 0.9}, False),
        ({"ffn_tokens": 64, "perturb_std": 0.1}, False),
        ({"hidden_multiple": 2}, True),
    ],
)
def test_which_growths_keep_the_outputs(keys, is_exact):
    assert keeps_outputs(tokenformer(), GrowthStage(**keys)) == is_exact


@pytest.mark.parametrize(
    "keys",
    [
        {"num_layers": 5, "layer_init": "copy"},
        {"ffn_tokens": 64, "init": "random"},
        {"ffn_tokens": 64, "init": "zero_value"},
        {"insert_layers": [1], "ffn_tokens": {"2": 50}, "init": "random"},
    ],
)
def test_a_growth_that_is_called_inexact_moves_the_logits(keys):
    source = random_checkpoint(tokenformer())
    assert relative_difference(logits_of(source), logits_of(grow(source, GrowthStage(**keys)))) > 1e-3


@pytest.mark.parametrize("layer_init", ["identity", "copy_zero"])
def test_random_tokens_of_new_layers_keep_the_logits(layer_init):
    source = random_checkpoint(tokenformer())
    stage = GrowthStage(insert_layers=[1], ffn_tokens={"1": 50}, init="random", layer_init=layer_init)
    assert relative_difference(logits_of(source), logits_of(grow(source, stage))) <= 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_zero_values_move_the_logits_as_far_as_the_norm_of_the_rows_does(norm):
    """With keys like the old ones, tau makes up for most of it: much less than random tokens do."""
    source = random_checkpoint(tokenformer(norm_activation=norm, init_method_std=0.3))
    moved = {
        init: relative_difference(logits_of(source), logits_of(grow(source, GrowthStage(ffn_tokens=512, init=init))))
        for init in ("zero_value", "random")
    }
    assert moved["zero_value"] < 0.5 * moved["random"]
