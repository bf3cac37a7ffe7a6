"""A resumed run says what changed, and refuses what would silently change its data or its learning rate."""

import itertools
import json

import numpy as np
import pytest
import yaml

from megatron_tf import pretrain
from megatron_tf.checkpoint.load import CheckpointReader
from tests.support.commands import make_run

LINE = "changed since"
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of four steps under cosine to its end, at which it is saved."""
    folder = make_run(tmp_path_factory.mktemp("changes"), training={"train_iters": 4})
    assert train(folder, "base") == 0
    return folder


def train(folder, name, *options):
    return pretrain.main([str(folder / "run.yaml"), f"--checkpoint.save={folder / name}", *options])


def resume(folder, capsys, *options):
    """(exit code, lines that list changes, lines of errors) of a run that starts from the base."""
    capsys.readouterr()
    code = train(folder, f"resumed-{next(NUMBERS)}", f"--checkpoint.load={folder / 'base'}", *options)
    said = capsys.readouterr()
    return code, [line for line in said.out.splitlines() if LINE in line], said.err.splitlines()


@pytest.mark.parametrize(
    "option",
    [
        "training.seq_length=8",
        "training.seed=5",
        "data.split='50,50,0'",
        "data.order=megatron",
        "training.train_iters=5",
    ],
)
def test_what_silently_changes_data_or_rates_is_refused_by_key(folder, capsys, option):
    key = option.partition("=")[0]
    code, _, errors = resume(folder, capsys, f"--{option}")
    assert code == 1
    assert len(errors) == 1
    assert f"{key} " in errors[0]
    assert f"checkpoint.allow_changes: [{key}]" in errors[0]
    code, listed, errors = resume(folder, capsys, f"--{option}", f"--checkpoint.allow_changes=[{key}]")
    assert (code, errors) == (0, [])
    assert len(listed) == 1
    assert listed[0].count(key) == 1


def test_other_keys_are_listed_once_and_train_iters_is_free_without_a_decay(folder, capsys):
    constant = ["--optimizer.lr_decay_style=constant", "--optimizer.lr=0.01", "--training.train_iters=5"]
    code, (line,), _ = resume(folder, capsys, *constant)
    assert code == 0
    assert "optimizer.lr 0.001 -> 0.01" in line
    assert "optimizer.lr_decay_style 'cosine' -> 'constant'" in line
    assert "training.train_iters 4 -> 5" in line


def test_nothing_is_listed_where_nothing_changed(folder, capsys):
    code, listed, _ = resume(folder, capsys)
    assert (code, listed) == (0, [])


def test_data_that_moved_is_the_same_and_data_that_changed_is_not(folder, capsys):
    (prefix,) = yaml.safe_load((folder / "run.yaml").read_text())["data"]["data_path"]
    moved = folder / "elsewhere" / "data_text_document"
    moved.parent.mkdir()
    for suffix in (".bin", ".idx", ".json"):
        moved.with_name(moved.name + suffix).write_bytes((folder / (prefix + suffix)).read_bytes())
    option = f"--data.data_path=[{moved}]"
    code, (line,), _ = resume(folder, capsys, option)
    assert code == 0
    assert "data.data_path" in line
    tokens = np.fromfile(f"{moved}.bin", np.uint16)
    tokens[-2] ^= 1
    tokens.tofile(f"{moved}.bin")
    code, _, (error,) = resume(folder, capsys, option)
    assert code == 1
    assert "allow_changes: [data.data_path]" in error


def test_documents_that_changed_in_their_place_are_refused(folder, capsys):
    (prefix,) = yaml.safe_load((folder / "run.yaml").read_text())["data"]["data_path"]
    before = np.fromfile(f"{prefix}.bin", np.uint16)
    changed = before.copy()
    changed[0] ^= 1
    changed.tofile(f"{prefix}.bin")
    try:
        code, _, (error,) = resume(folder, capsys)
        assert code == 1
        assert "checkpoint.allow_changes: [data.content]" in error
        code, (line,), _ = resume(folder, capsys, "--checkpoint.allow_changes=[data.content]")
        assert code == 0
        assert "data.content" in line
    finally:
        before.tofile(f"{prefix}.bin")


def test_fine_tuning_starts_at_step_0_with_the_weights_and_resumes_like_any_run(folder, capsys):
    options = [f"--checkpoint.load={folder / 'base'}", "--checkpoint.finetune=true", "--training.seed=7"]
    metrics = folder / "tuned.jsonl"
    assert train(folder, "tuned", *options, f"--logging.metrics_file={metrics}", "--optimizer.lr=1e-9") == 0
    reader = CheckpointReader(folder / "tuned")
    training = reader.record.training
    assert (training.step, training.adam_steps, training.samples) == (4, 4, 32)
    first = next(line for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line)
    assert first["step"] == 1
    assert first["loss"] < 5.5  # a new run's is log(257) = 5.55
    capsys.readouterr()
    assert train(folder, "tuned", *options, "--optimizer.lr=1e-9") == 0
    assert "nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, message",
    [
        ("--checkpoint.finetune=true", "checkpoint.finetune needs checkpoint.load"),
        ("--checkpoint.allow_changes=[training.sed]", "unknown key 'training.sed'; did you mean 'training.seed'?"),
    ],
)
def test_options_that_cannot_be_are_named(folder, capsys, option, message):
    assert train(folder, "none", option) == 1
    assert message in capsys.readouterr().err
