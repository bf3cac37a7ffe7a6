"""The record of a run: what version 0.1 wrote is written again byte for byte; unknown keys are ignored and missing
ones are named, at every level."""

import copy
import json
import re

import pytest

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generation, Run
from megatron_tf.checkpoint.growth_event import GrowthEvent
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.checkpoint.run_state import LossScale, RunDetails, Usage
from megatron_tf.checkpoint.vocabulary import pad_vocabulary
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support import toy
from tests.support.paths import ROOT

OLD = sorted((ROOT / "tests" / "data" / "version_0_1").glob("*/saved/step_*/metadata.json"))
MODEL = {
    "num_layers": 3,
    "hidden_size": 6,
    "num_attention_heads": 6,
    "layer": "tokenformer",
    "norm": "layernorm",
    "mlp": "gelu",
    "qk_norm": False,
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
    "output_init_method_std": None,
}
NEW_MODEL_KEYS = {"norm": "layernorm", "mlp": "gelu", "qk_norm": False, "output_init_method_std": None}
"""Keys that version 0.1 did not write, with the model that it had."""
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
            "hidden_size": [6, 12],
        },
        {
            "step": 3,
            "samples": 32,
            "tokens": 192,
            "kinds": {},
            "init": "drop_layers",
            "seed": 7,
            "dropped_layers": [0, 2],
        },
    ],
    "training": {"step": 3, "samples": 32, "tokens": 192, "adam_steps": 3, "skipped": 1, "overflows": 2},
    "usage": {"flops": 2703360.0, "device_seconds": 0.55},
    "run": {
        "data": [{"index_bytes": 9, "index": "0f"}, {}],
        "spikes": {"losses": [5.5, 5.25], "in_a_row": 1},
        "evaluation_due": True,
        "blend": "spaced",
        "dropout": "splitmix64",
    },
    "loss_scale": {"scale": 4294967296.0, "growth_tracker": 3, "hysteresis_tracker": -1},
    "generations": {
        "table": [
            {
                "growth": 0,
                "exp_avg_steps": 3,
                "exp_avg_sq_steps": 2,
                "step_scale": 0.5,
                "lr_scale": 0.25,
                "rewarmup_iters": 5,
                "rewarmup_done": 1,
            }
        ],
        "rows": {"layers.0.ffn.key_tokens": [[0, 36]]},
    },
    "schedule_start": {"step": 2, "tokens": 128},
    "growth_stage": 1,
}
"""Every key that is written, in the order in which it is written."""
SECTIONS = ["", "model", "config", "config.training", "training", "usage", "run", "run.spikes", "loss_scale"]
SECTIONS += ["lineage[0]", "generations", "generations.table[0]", "schedule_start"]
REQUIRED = ["model", "config", "tau", "tokenizer", "lineage", "config.training", "config.training.seq_length"]
REQUIRED += ["config.training.seed", "model.num_layers", "model.hidden_size", "model.ffn_tokens", "model.vocab_size"]
REQUIRED += [f"training.{key}" for key in ("samples", "tokens", "adam_steps", "skipped")]
REQUIRED += [f"lineage[0].{key}" for key in ("step", "samples", "tokens", "kinds", "init", "seed")]
REQUIRED += ["generations.table", "generations.rows", "schedule_start.step", "schedule_start.tokens"]
REQUIRED += [f"generations.table[0].{key}" for key in FULL["generations"]["table"][0]]
REQUIRED += ["run.spikes.losses", "run.spikes.in_a_row"]
REQUIRED += [f"loss_scale.{key}" for key in ("scale", "growth_tracker", "hysteresis_tracker")]
DEFAULTS = {
    "usage": ("usage", Usage(0.0, 0.0)),
    "run": ("details", RunDetails(data=None, spikes=None, evaluation_due=False)),
    "loss_scale": ("loss_scale", None),
    "generations": ("generations", None),
    "schedule_start": ("schedule_start", None),
    "growth_stage": ("growth_stage", None),
    "training.overflows": ("training.overflows", 0),
    "usage.flops": ("usage.flops", 0.0),
    "usage.device_seconds": ("usage.device_seconds", 0.0),
    "run.data": ("details.data", None),
    "run.spikes": ("details.spikes", None),
    "run.dropout": ("details.dropout", None),
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
    written = record.to_json()
    assert {key: written["model"].pop(key) for key in NEW_MODEL_KEYS} == NEW_MODEL_KEYS
    if "after_growth" in json.loads(text):  # generations say what it said, and more
        assert list(written)[-1] == "generations"
        written["after_growth"] = json.loads(text)["after_growth"]
        del written["generations"]
    assert json.dumps(written, indent=1) == text
    assert record.growth_stage is None


def test_rows_after_a_growth_of_version_0_1_have_one_count_of_updates():
    path = next(path for path in OLD if path.parents[2].name == "grown")
    values = json.loads(path.read_text())
    assert values["training"]["step"] == values["training"]["adam_steps"] == 3
    record = RunRecord.from_json(values, path)
    after = values["after_growth"]
    counts = {"exp_avg_steps": 3, "exp_avg_sq_steps": 3, "rewarmup_iters": after["rewarmup_iters"]}
    counts["rewarmup_done"] = min(3 - after["step"], after["rewarmup_iters"])
    for name, parameter in model_parameters(record.model).items():
        old, rows = after["old_rows"].get(name), parameter.shape[0]
        runs = record.all_generations.runs(name, rows)
        if old is None:
            assert runs == [Run(rows, Generation(**counts))]
            continue
        slow = Run(old, Generation(**counts, lr_scale=after["old_tokens_lr_scale"]))
        new = Run(rows - old, Generation(**counts, growth=1))
        assert runs == [part for part in (slow, new) if part.count]


def test_old_rows_of_too_few_tensors_are_refused():
    values = {**copy.deepcopy(FULL), "after_growth": {"step": 2, "rewarmup_iters": 5, "old_tokens_lr_scale": 0.5}}
    del values["generations"]
    values["after_growth"]["old_rows"] = {"layers.0.ffn.key_tokens": 36}
    with pytest.raises(CheckpointError, match=r"file: after_growth\.old_rows does not list the tokens of every layer"):
        RunRecord.from_json(values, "file")


def test_there_are_old_files():
    assert len(OLD) == 6


def test_every_key_is_written_in_its_order():
    record = RunRecord.from_json(copy.deepcopy(FULL), "file")
    assert json.dumps(record.to_json(), indent=1) == json.dumps(FULL, indent=1)
    assert record.to_json() == FULL  # lists, where a tuple would be written alike
    assert RunRecord.from_json(record.to_json(), "file") == record
    assert isinstance(record.lineage[0], GrowthEvent)
    assert record.loss_scale == LossScale(4294967296.0, 3, -1)
    assert record.generations.runs("layers.0.ffn.key_tokens", 36) == [Run(36, record.generations.table[0])]
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
    for name in ("model", "tau", "training", "usage", "details", "loss_scale", "lineage", "generations"):
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
        ("lineage[0].hidden_size", [6, 12, 24], "lineage[0].hidden_size is [6, 12, 24], expected [old, new]"),
        ("lineage[0].hidden_size", [0, 6], "lineage[0].hidden_size is [0, 6], expected [old, new]"),
        ("lineage[0].hidden_size", [True, 6], "lineage[0].hidden_size is [True, 6], expected [old, new]"),
        ("generations.table", [], "generations.table is empty"),
        ("generations.rows", {"w": [[1, 2]]}, "generations.rows of w is [[1, 2]], expected [index in table, rows]"),
        ("generations.rows", {"w": [[0, 0]]}, "generations.rows of w is [[0, 0]]"),
        ("generations.rows", {"w": [[0]]}, "generations.rows of w is [[0]]"),
        ("generations.rows", {"w": []}, "generations.rows of w is []"),
        ("generations.table[0].step_scale", 0, "generations.table[0].step_scale is 0, expected a number above 0"),
        ("generations.table[0].lr_scale", -1, "generations.table[0].lr_scale is -1, expected 0 or more"),
        ("generations.table[0].rewarmup_done", 99, "generations.table[0].rewarmup_done is 99, expected a whole number"),
        ("tau", {"layers.0.ffn": -6.0}, "tau of layers.0.ffn is -6.0, expected a number above 0"),
        ("growth_stage", True, "growth_stage is True"),
        ("config.model", 3, "config.model is int, expected an object"),
        ("config.data", [], "config.data is list, expected an object"),
        ("config.optimizer", 3, "config.optimizer is int, expected an object"),
        ("schedule_start.tokens", -1, "schedule_start.tokens is -1, expected a whole number"),
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
