"""The tokenizer's file is found from any directory: it travels with the checkpoint."""

import json
import shutil

import pytest

from megatron_tf import generate
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.tokenizer_file import STORED
from megatron_tf.commands import convert_checkpoint, reshard_checkpoint
from tests.support.conversion import save_small_model


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A checkpoint that was moved away from its tokenizer."""
    checkpoint = save_small_model(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(checkpoint.parent, tmp_path / "elsewhere" / "run")
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere" / "run"


def continued(run, *options):
    return generate.main([str(run), "--prompt", "w3", "--max-new-tokens", "2", "--temperature", "0", *options])


def test_generation_export_and_growth_work_where_the_file_has_gone(moved, tmp_path):
    assert continued(moved) == 0
    grow = ["--load", str(moved), "--save", str(tmp_path / "grown"), "--grow", "ffn=128"]
    assert reshard_checkpoint.main(grow) == 0
    assert continued(tmp_path / "grown") == 0
    export = [
        "--from=megatron_tf",
        "--to=hf",
        "--skip-check",
        f"--load={tmp_path / 'grown'}",
        f"--save={tmp_path / 'hf'}",
    ]
    assert convert_checkpoint.main(export) == 0
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def test_the_stored_file_is_no_part_of_the_format(moved):
    reader = CheckpointReader(moved)
    reader.verify()
    assert [path.name for path in (reader.directory / STORED).iterdir()] == ["tokenizer.json"]
    assert all(not name.startswith(".") for name in reader.manifest.files)


def test_a_stored_file_of_other_contents_is_not_used(moved, capsys):
    [path] = moved.glob(f"step_*/{STORED}/*")
    text = json.loads(path.read_text())
    text["version"] = "1.1"
    path.write_text(json.dumps(text))
    assert continued(moved) == 1
    assert "pass it with --tokenizer-model" in capsys.readouterr().err


def test_the_message_says_where_it_was_looked_for_and_what_to_give(moved, tmp_path, capsys):
    [path] = moved.glob(f"step_*/{STORED}/*")
    path.rename(tmp_path / "kept.json")
    assert continued(moved) == 1
    error = capsys.readouterr().err
    assert f"its file is neither {tmp_path / 'tokenizer.json'} nor stored in {moved / 'step_00000000'}" in error
    assert "pass it with --tokenizer-model" in error
    assert continued(moved, "--tokenizer-model", str(tmp_path / "kept.json")) == 0
    assert continued(moved, "--tokenizer-model", str(tmp_path / "none.json")) == 1


def test_a_run_whose_file_has_moved_saves_without_it(tmp_path):
    checkpoint = save_small_model(tmp_path)
    shutil.rmtree(checkpoint / STORED)
    (tmp_path / "tokenizer.json").unlink()
    assert reshard_checkpoint.main(["--load", str(checkpoint), "--save", str(tmp_path / "b"), "--verify"]) == 0
    assert not list((tmp_path / "b").glob(f"step_*/{STORED}"))
