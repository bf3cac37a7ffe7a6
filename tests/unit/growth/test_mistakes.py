"""Growth that makes no sense: one line that says which key, which number and what to do."""

import pytest
import yaml

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.config import ConfigError, GrowthStage, ModelConfig, RunConfig, parse_config, to_dict
from megatron_tf.growth.grow import grow
from tests.support import toy
from tests.support.grown_models import TRANSFORMER, random_checkpoint, tokenformer
from tests.support.training import small_run

MODELS = {
    "tokenformer": tokenformer(),
    "softmax": tokenformer(norm_activation="softmax"),
    "transformer": ModelConfig(**TRANSFORMER),
}
LAYERS = {
    "fewer layers": (
        {"num_layers": 2},
        "num_layers=2: the model already has 3, and growth only adds layers; .* --drop",
    ),
    "as many layers": ({"num_layers": 3}, "the growth adds nothing"),
    "two places": ({"num_layers": 5, "insert_layers": [1]}, "num_layers and insert_layers both place new layers"),
    "no such layer": ({"insert_layers": [4]}, "insert_layers names layer 4, but the model has 3 layers"),
    "an order of none": ({"ffn_tokens": 40, "layer_order": "stacked"}, "layer_order=stacked places .* set num_layers"),
    "an order of places": ({"insert_layers": [1], "layer_order": "middle"}, "layer_order=middle .* remove layer_order"),
    "copies of none": (
        {"ffn_tokens": 40, "layer_init": "copy_zero"},
        "layer_init=copy_zero: no layer is new; set num_",
    ),
    "full copies of none": ({"num_layers": 3, "layer_init": "copy"}, "layer_init=copy: no layer is new"),
    "a smaller copy": (
        {"insert_layers": [1], "layer_init": "copy_zero", "ffn_tokens": {"1": 31}},
        "ffn_tokens=31: a new layer is a copy of layer 1, which has 32; request at least as many, or .* identity",
    ),
}
TOKENFORMER = {
    "hidden units": (
        {"ffn_tokens": 40, "mlp_init": "zero_value"},
        "mlp_init=zero_value is for layer: transformer: set",
    ),
    "fewer tokens": ({"proj_tokens": 19}, "proj_tokens=19: layer 0 already has 20, and growth only adds .* --shrink"),
    "no copies": (
        {"ffn_tokens": 63, "init": "duplicate"},
        "ffn_tokens=63: duplicate .* needs at least 64; use zero_key",
    ),
    "no rotations": (
        {"ffn_tokens": 63, "init": "rotated_key"},
        "ffn_tokens=63: rotated_key .* needs at least 64; use zero_key",
    ),
}
SOFTMAX = {
    "zero keys": ({"ffn_tokens": 40}, r"ffn_tokens=40: a softmax model .* exp\(0\) = 1"),
    "rotations": (
        {"ffn_tokens": 64, "init": "rotated_key"},
        "ffn_tokens=64: rotated_key .* only norm_activation l2_norm_gelu .* use duplicate with softmax",
    ),
    "a remainder": ({"ffn_tokens": 65, "init": "duplicate"}, "ffn_tokens=65: a softmax model .* multiple of its 32"),
    "zero keys in a copied layer": (
        {"insert_layers": [1], "layer_init": "copy_zero", "qkv_tokens": {"1": 30}},
        r"qkv_tokens=30: a softmax model cannot be grown exactly with zero keys",
    ),
}
PLAIN = {
    "tokens": (
        {"ffn_tokens": 40, "qkv_tokens": 40},
        "qkv_tokens: a model with layer: transformer has none; its MLP has",
    ),
    "an init of tokens": ({"ffn_tokens": 64, "init": "duplicate"}, "init=duplicate is for parameter .* set mlp_init"),
    "an init of no units": ({"num_layers": 4, "mlp_init": "zero_value"}, "mlp_init=zero_value: no hidden unit is new"),
    "fewer units": ({"ffn_tokens": 31, "mlp_init": "zero_value"}, "ffn_tokens=31: layer 0 already has 32"),
}
CASES = [
    *(("tokenformer", *case) for case in (LAYERS | TOKENFORMER).values()),
    *(("softmax", *case) for case in SOFTMAX.values()),
    *(("transformer", *case) for case in (LAYERS | PLAIN).values()),
]


@pytest.mark.parametrize(("model", "keys", "message"), CASES)
def test_a_growth_that_cannot_be_is_explained_in_one_line(model, keys, message):
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        grow(random_checkpoint(MODELS[model]), parse_config(GrowthStage, keys, "stage.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"moments": "keep", "adam_state": "keep"},
            "growth.0.moments is another name of adam_state, which is given too: keep one of them",
        ),
        ({"moments": "none"}, "growth.0.moments: Input should be 'keep', 'reset', 'reset_new' or 'reset_second'"),
        ({"layer_inti": "copy"}, "unknown key 'growth.0.layer_inti'; did you mean 'layer_init'?"),
        ({"layer_order": "reversed"}, "growth.0.layer_order: Input should be 'interleaved', 'stacked' or 'middle'"),
        ({"num_layers": 2}, "growth[0]: num_layers=2: the model already has 3"),
        ({"layer_init": "copy"}, "growth[0]: layer_init=copy: no layer is new"),
    ],
)
def test_a_run_names_the_stage_and_the_key(keys, message):
    values = to_dict(small_run(checkpoint={"save": "saved"})) | {"growth": [{"at_step": 1, "ffn_tokens": 128, **keys}]}
    with pytest.raises(ConfigError) as caught:
        parse_config(RunConfig, values, "run.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_either_name_of_the_adam_state_is_read():
    for key in ("moments", "adam_state"):
        stage = parse_config(GrowthStage, {"ffn_tokens": 40, key: "reset"}, "stage.yaml")
        assert stage.adam_state == "reset"


def tool(source, target, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(target), *map(str, options)])


def test_every_option_of_growth_says_the_same_as_its_key_in_a_stage_file(tmp_path):
    toy.save(tmp_path / "a", toy.random_tensors())
    stage = {
        "ffn_tokens": 72,
        "init": "duplicate",
        "noise": 0.25,
        "num_layers": 5,
        "layer_order": "middle",
        "layer_init": "copy",
        "adam_state": "reset_second",
        "step_scale": "none",
        "old_tokens_lr_scale": 0.5,
        "new_tokens_lr_scale": 2.0,
        "rewarmup_iters": 4,
        "rewarmup": "new",
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage))
    options = ["--grow", "ffn=72", "--growth-init", "duplicate", "--growth-noise", 0.25, "--num-layers", 5]
    options += ["--layer-order", "middle", "--layer-init", "copy", "--adam-state", "reset_second"]
    options += ["--step-scale", "none", "--old-tokens-lr-scale", 0.5, "--new-tokens-lr-scale", 2]
    options += ["--rewarmup-iters", 4, "--rewarmup", "new"]
    assert tool(tmp_path / "a", tmp_path / "b", "--stage", tmp_path / "stage.yaml", "--verify") == 0
    assert tool(tmp_path / "a", tmp_path / "c", *options) == 0
    one, other = CheckpointReader(tmp_path / "b"), CheckpointReader(tmp_path / "c")
    assert list(differences(one, other)) == []
    assert one.record == other.record
    assert {generation.lr_scale for generation in one.record.all_generations.table} >= {0.5, 2.0}


@pytest.mark.parametrize("option", ["--adam-state", "--moments"])
def test_an_option_overrides_both_names_of_the_adam_state_in_a_stage_file(tmp_path, option):
    toy.save(tmp_path / "a", toy.random_tensors())
    for key in ("moments", "adam_state"):
        (tmp_path / "stage.yaml").write_text(f"ffn_tokens: 72\n{key}: keep\n")
        assert tool(tmp_path / "a", tmp_path / key, "--stage", tmp_path / "stage.yaml", option, "reset") == 0
        assert CheckpointReader(tmp_path / key).record.training.adam_steps == 0


@pytest.mark.parametrize(
    "options", [["--num-layers", 4, "--layer-init", "copy"], ["--grow", "ffn=72", "--growth-init", "random"]]
)
def test_the_tool_says_that_a_growth_moves_the_outputs(tmp_path, capsys, options):
    toy.save(tmp_path / "a", toy.random_tensors())
    assert tool(tmp_path / "a", tmp_path / "b", *options, "--verify") == 0
    assert "does not preserve the model's outputs" in capsys.readouterr().out


@pytest.mark.parametrize("layer_init", ["identity", "copy_zero"])
def test_the_tool_verifies_that_new_layers_keep_the_outputs(tmp_path, capsys, layer_init):
    toy.save(tmp_path / "a", toy.random_tensors())
    options = ["--num-layers", 6, "--layer-order", "stacked", "--layer-init", layer_init]
    assert tool(tmp_path / "a", tmp_path / "b", *options, "--target-tensor-parallel-size", 2, "--verify") == 0
    assert "max |delta logit| before and after: 0 " in capsys.readouterr().out
