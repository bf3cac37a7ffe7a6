"""The record of a run: what version 0.1 wrote is written again byte for byte; unknown keys are ignored and missing
ones are named, at every level."""

import copy
import json
import re

import pytest

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import AfterGrowth, GrowthEvent, LossScale, RunDetails, RunRecord, Usage
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.checkpoint.vocabulary import pad_vocabulary
from tests.support import toy
from tests.support.paths import ROOT

OLD = sorted((ROOT / "tests" / "data" / "version_0_1").glob("*/saved/step_*/metadata.json"))
MODEL = {
    "num_layers": 3,
    "hidden_size": 6,
    "num_attention_heads": 6,
    "layer": "tokenformer",
    "qkv_tokens": 12,
    "proj_tokens": 12,
    "ffn_tokens": [36, 48, 36],
    "vocab_size": 24,
    "make_vocab_size_divisible_by": 24,
    "norm_activation": "l2_norm_gelu",
    "untie_embeddings_and_output_weights": False,
    "rotary_percent": 0.25,
    "rotary_base": 10000.0,
    "layernorm_epsilon": 1e-05,
    "init_method_std": 0.02,
}
FULL = {
    "model": MODEL,
    "config": {"model": MODEL, "training": {"seq_length": 8, "seed": 7}, "data": {"tokenizer_model": None}},
    "tau": {"layers.0.ffn": 6.0, "layers.1.ffn": 7},
    "tokenizer": {"type": "NullTokenizer", "vocab_size": 257, "sha256": None},
    "lineage": [
        {
            "step": 2,
            "samples": 16,
            "tokens": 128,
            "kinds": {"ffn": [36, [36, 48, 36]]},
            "init": "zero_key",
            "seed": 7,
            "inserted_layers": [1],
        }
    ],
    "training": {"step": 3, "samples": 32, "tokens": 192, "adam_steps": 3, "skipped": 1, "overflows": 2},
    "usage": {"flops": 2703360.0, "device_seconds": 0.55},
    "run": {
        "data": [{"index_bytes": 9, "index": "0f"}, {}],
        "spikes": {"losses": [5.5, 5.25], "in_a_row": 1},
        "evaluation_due": True,
        "blend": "spaced",
    },
    "loss_scale": {"scale": 4294967296.0, "growth_tracker": 3, "hysteresis_tracker": -1},
    "after_growth": {
        "step": 2,
        "rewarmup_iters": 5,
        "old_tokens_lr_scale": 0.5,
        "old_rows": {"layers.0.ffn.key_tokens": 36},
    },
    "growth_stage": 1,
}
"""Every key that is written, in the order in which it is written."""
SECTIONS = ["", "model", "config", "config.training", "training", "usage", "run", "run.spikes", "loss_scale"]
SECTIONS += ["lineage[0]", "after_growth"]
REQUIRED = ["model", "config", "tau", "tokenizer", "lineage", "config.training", "config.training.seq_length"]
REQUIRED += ["config.training.seed", "model.num_layers", "model.hidden_size", "model.ffn_tokens", "model.vocab_size"]
REQUIRED += [f"training.{key}" for key in ("samples", "tokens", "adam_steps", "skipped")]
REQUIRED += [f"lineage[0].{key}" for key in ("step", "samples", "tokens", "kinds", "init", "seed")]
REQUIRED += [f"after_growth.{key}" for key in ("step", "rewarmup_iters", "old_tokens_lr_scale", "old_rows")]
REQUIRED += ["run.spikes.losses", "run.spikes.in_a_row"]
REQUIRED += [f"loss_scale.{key}" for key in ("scale", "growth_tracker", "hysteresis_tracker")]
DEFAULTS = {
    "usage": ("usage", Usage(0.0, 0.0)),
    "run": ("details", RunDetails(data=None, spikes=None, evaluation_due=False)),
    "loss_scale": ("loss_scale", None),
    "after_growth": ("after_growth", None),
    "growth_stage": ("growth_stage", None),
    "training.overflows": ("training.overflows", 0),
    "usage.flops": ("usage.flops", 0.0),
    "usage.device_seconds": ("usage.device_seconds", 0.0),
    "run.data": ("details.data", None),
    "run.spikes": ("details.spikes", None),
    "run.evaluation_due": ("details.evaluation_due", False),
    "config.data": ("data", {}),
    "model.layer": ("model.layer", "tokenformer"),
}
"""Key -> (the attribute, what it is where the key is absent)."""


def section_of(values, path):
    """The object at a path such as "lineage[0]"."""
    for part in filter(None, path.split(".")):
        name, _, index = part.rstrip("]").partition("[")
        values = values[name][int(index)] if index else values[name]
    return values


def without(path):
    """A full file, but for one key."""
    values = copy.deepcopy(FULL)
    parent, _, key = path.rpartition(".")
    del section_of(values, parent)[key]
    return values


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.parents[2].name)
def test_what_version_0_1_wrote_is_written_again_byte_for_byte(path):
    text = path.read_text()
    record = RunRecord.from_json(json.loads(text), path)
    assert json.dumps(record.to_json(), indent=1) == text
    assert record.growth_stage is None


def test_there_are_old_files():
    assert len(OLD) == 6


def test_every_key_is_written_in_its_order():
    record = RunRecord.from_json(copy.deepcopy(FULL), "file")
    assert json.dumps(record.to_json(), indent=1) == json.dumps(FULL, indent=1)
    assert record.to_json() == FULL  # lists, where a tuple would be written alike
    assert RunRecord.from_json(record.to_json(), "file") == record
    assert isinstance(record.lineage[0], GrowthEvent)
    assert record.loss_scale == LossScale(4294967296.0, 3, -1)
    assert record.after_growth == AfterGrowth(2, 5, 0.5, {"layers.0.ffn.key_tokens": 36})
    assert (record.seq_length, record.seed, record.model.token_counts("ffn")) == (8, 7, [36, 48, 36])


def test_a_model_that_no_run_has_trained_has_the_keys_that_a_conversion_writes():
    values = {key: FULL[key] for key in ("model", "config", "tau", "tokenizer", "lineage", "training")}
    values["training"] = {"step": 0, "samples": 0, "tokens": 0, "adam_steps": 0, "skipped": 0}
    assert json.dumps(RunRecord.from_json(values, "file").to_json()) == json.dumps(values)


@pytest.mark.parametrize("path", SECTIONS, ids=lambda path: path or "top")
def test_unknown_keys_are_ignored_at_every_level(path):
    values = copy.deepcopy(FULL)
    section_of(values, path)["of_a_later_version"] = [{"x": 1}]
    record = RunRecord.from_json(values, "file")
    known = RunRecord.from_json(copy.deepcopy(FULL), "file")
    for name in ("model", "tau", "training", "usage", "details", "loss_scale", "lineage", "after_growth"):
        assert getattr(record, name) == getattr(known, name)


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_key_is_one_line_with_the_file_and_the_key(path):
    with pytest.raises(CheckpointError) as caught:
        RunRecord.from_json(without(path), "runs/base/step_00000003/metadata.json")
    section, _, key = path.rpartition(".")
    named = f"{section}: missing key '{key}'" if section == "model" else f"{path} is missing, expected "
    assert str(caught.value).startswith(f"runs/base/step_00000003/metadata.json: {named}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", ["training", "training.step"])
def test_a_file_that_does_not_tell_its_step_is_no_metadata(path):
    with pytest.raises(CheckpointError, match=r"^file does not say training\.step"):
        RunRecord.from_json(without(path), "file")


@pytest.mark.parametrize("path", DEFAULTS)
def test_a_key_that_some_writer_left_out_has_its_default(path):
    found = RunRecord.from_json(without(path), "file")
    attribute, default = DEFAULTS[path]
    for name in attribute.split("."):
        found = getattr(found, name)
    assert found == default


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.skipped", -1, "training.skipped is -1, expected a whole number from 0"),
        ("training.overflows", 1.5, "training.overflows is 1.5"),
        ("usage.flops", float("inf"), "usage.flops is inf, expected a finite number"),
        ("run.evaluation_due", 1, "run.evaluation_due is 1, expected true or false"),
        ("run.data", [3], "run.data[0] is int, expected an object"),
        ("run.spikes.losses", [1.0, "x"], "run.spikes.losses[1] is 'x'"),
        ("loss_scale.growth_tracker", 0.5, "loss_scale.growth_tracker is 0.5, expected a whole number"),
        ("lineage[0].kinds", {"ffn": [3]}, "lineage[0].kinds.ffn is [3], expected [old, new]"),
        ("lineage[0].init", 3, "lineage[0].init is 3, expected a string"),
        ("after_growth.old_rows", {"w": -1}, "after_growth.old_rows of w is -1"),
        ("growth_stage", True, "growth_stage is True"),
        ("config.data", [], "config.data is list, expected an object"),
        ("model.hidden_size", -1, "model: hidden_size: Input should be greater than 0"),
    ],
)
def test_an_impossible_value_is_named(path, value, message):
    values = copy.deepcopy(FULL)
    parent, _, key = path.rpartition(".")
    section_of(values, parent)[key] = value
    with pytest.raises(CheckpointError, match=f"^file: {re.escape(message)}"):
        RunRecord.from_json(values, "file")


def test_a_tool_writes_keys_of_a_later_version_again(tmp_path):
    source = CheckpointReader(toy.save(tmp_path / "a", toy.random_tensors()))
    source.record = RunRecord.from_json({**source.record.to_json(), "future": [1]}, "file")
    written = reshard(pad_vocabulary(source, 5), tmp_path / "b", toy.target(1, 1))
    assert json.loads((written / "metadata.json").read_text())["future"] == [1]
