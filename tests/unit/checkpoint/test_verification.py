"""Verification: NaN, state outside the tensors and data of another tokenizer are found; an exact copy passes."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_tf import evaluate
from megatron_tf.checkpoint.growth_event import GrowthEvent
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.run_state import LossScale
from megatron_tf.commands import convert_checkpoint, inspect_checkpoint, reshard_checkpoint, resharding
from megatron_tf.data.tokenizer import NullTokenizer
from megatron_tf.errors import UserError
from megatron_tf.inference.comparison import Comparison
from tests.support import toy
from tests.support.conversion import save_small_model
from tests.support.data import write_data_set
from tests.support.models import random_model, write_checkpoint


def tool(source, target, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(target), *map(str, options)])


@pytest.mark.parametrize("change", [["--growth-init", "duplicate", "--growth-noise", "1e30"]])
def test_growth_to_nan_fails_verification(tmp_path, capsys, change):
    checkpoint = save_small_model(tmp_path)
    assert tool(checkpoint, tmp_path / "grown", "--grow", "ffn=128", *change, "--verify") == 3
    assert "logits became infinite or NaN" in capsys.readouterr().err


def test_growth_that_is_not_exact_fails_too_where_it_gives_nan(tmp_path, capsys, monkeypatch):
    comparison = Comparison(float("nan"), 1.0, None, became_non_finite=3)
    monkeypatch.setattr(resharding, "compare_models", lambda *arguments, **options: comparison)
    checkpoint = save_small_model(tmp_path)
    assert tool(checkpoint, tmp_path / "grown", "--grow", "ffn=128", "--growth-init", "random", "--verify") == 3
    assert "3 logits became infinite or NaN" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["exp_avg", "model"])
def test_a_copy_of_a_nan_passes_verification(tmp_path, group):
    tensors = toy.random_tensors()
    tensors[group]["layers.0.ffn.value_tokens"][3, 2] = float("nan")
    toy.save(tmp_path / "a", tensors)
    assert tool(tmp_path / "a", tmp_path / "b", "--verify") == 0
    assert inspect_checkpoint.main([str(tmp_path / "a"), "--diff", str(tmp_path / "b")]) == 0


def test_another_bit_of_a_zero_fails_verification(tmp_path, capsys, monkeypatch):
    toy.save(tmp_path / "a", toy.random_tensors())
    source = resharding.CheckpointReader(tmp_path / "a")
    changed = toy.random_tensors()
    changed["exp_avg"]["final_norm.bias"][0] = float("nan")
    other = toy.save(tmp_path / "b", changed)
    with pytest.raises(resharding.VerificationError, match=r"is not as expected: exp_avg final_norm\.bias"):
        resharding.check_tensors(source, other, lambda num_bytes: None)


RECORD = toy.record()
STATE = {
    "tau": {"tau": {**RECORD.tau, "layers.0.ffn": 2.0}},
    "training": {"training": replace(RECORD.training, adam_steps=3)},
    "loss_scale": {"loss_scale": LossScale(2.0, 0, 2)},
    "tokenizer": {"tokenizer": {**RECORD.tokenizer, "vocab_size": 3}},
    "lineage": {"lineage": (GrowthEvent(step=1, samples=1, tokens=1, kinds={}, init="zero_key", seed=1),)},
}


@pytest.mark.parametrize("key", STATE)
def test_state_outside_the_tensors_is_a_difference(tmp_path, capsys, key):
    toy.save(tmp_path / "a", toy.random_tensors())
    toy.save(tmp_path / "b", toy.random_tensors(), facts=replace(RECORD, **STATE[key]))
    assert inspect_checkpoint.main([str(tmp_path / "a"), "--diff", str(tmp_path / "b")]) == 1
    assert f"metadata {key!r} differs" in capsys.readouterr().out


def test_where_a_run_kept_its_files_is_no_difference_of_state(tmp_path, capsys):
    toy.save(tmp_path / "a", toy.random_tensors())
    toy.save(tmp_path / "b", toy.random_tensors(), facts=RECORD.with_data(data_path=["elsewhere"]))
    assert inspect_checkpoint.main([str(tmp_path / "a"), "--diff", str(tmp_path / "b")]) == 0
    assert "metadata 'config' differs" in capsys.readouterr().out


def test_which_stages_a_run_counts_is_no_difference_of_state(tmp_path, capsys):
    """A model that grew in a run trains like one that the tool has grown."""
    toy.save(tmp_path / "a", toy.random_tensors(), facts=replace(RECORD, growth_stage=1))
    toy.save(tmp_path / "b", toy.random_tensors())
    assert inspect_checkpoint.main([str(tmp_path / "a"), "--diff", str(tmp_path / "b")]) == 0
    assert "metadata 'growth_stage' differs" in capsys.readouterr().out


def data_of_bytes(folder):
    """A data set whose report says that another tokenizer made it."""
    prefix = write_data_set(folder / "data", [[5] * 200] * 3)
    (folder / "data.json").write_text(json.dumps({"tokenizer": NullTokenizer().identity}))
    return prefix


WAYS = {
    "evaluate": lambda run, data, out: evaluate.main([str(run), "--data-path", str(data)]),
    "shrink": lambda run, data, out: tool(run, out, "--shrink", "ffn=16", "--data", data),
    "report": lambda run, data, out: tool(run, out, "--grow", "ffn=128", "--data", data),
    "card": lambda run, data, out: convert_checkpoint.main(
        ["--from=megatron_tf", "--to=hf", "--skip-check", f"--load={run}", f"--save={out}", f"--data={data}"]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_data_of_another_tokenizer_is_refused(tmp_path, capsys, way):
    checkpoint = save_small_model(tmp_path)
    assert WAYS[way](checkpoint, data_of_bytes(tmp_path), tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "was made with another tokenizer ({'type': 'NullTokenizer'" in error
    assert not (tmp_path / "out").exists()


def test_a_report_that_names_no_tokenizer_is_refused(tmp_path, capsys):
    checkpoint, data = save_small_model(tmp_path), data_of_bytes(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    assert evaluate.main([str(checkpoint), "--data-path", str(data)]) == 1
    assert "data.json is not the report of a dataset: it names no tokenizer" in capsys.readouterr().err


def test_evaluation_of_a_model_that_gives_nan_ends_with_an_error(tmp_path, capsys):
    model = random_model()
    with torch.no_grad():
        model.transformer.final_norm.bias[0] = float("nan")
    write_checkpoint(tmp_path / "run", model)
    data = write_data_set(tmp_path / "data", [[1, 2, 3]])
    assert evaluate.main([str(tmp_path / "run"), "--data-path", str(data)]) == 1
    assert "the model's logits are NaN" in capsys.readouterr().err


def test_tokens_of_a_model_that_gives_nan_have_no_order(tmp_path, capsys):
    checkpoint = save_small_model(tmp_path)
    model = CheckpointReader(checkpoint).record.model
    importance = {"layers.0.ffn": torch.tensor([1.0, float("nan")])}
    with pytest.raises(UserError, match="has infinite or NaN contributions"):
        resharding.keep_most_important(model, importance, {"ffn": 1})
    assert checkpoint.exists()
