"""What a tool writes never replaces, or stands among, what belongs to another run; nor is it inside a checkpoint."""

import pytest

from megatron_tf import evaluate
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import convert_checkpoint, reshard_checkpoint
from tests.support.conversion import save_small_model
from tests.support.data import write_data_set
from tests.support.toy import random_tensors, read_all, same, save


def tool(source, target, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(target), *map(str, options)])


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("steps", [(100,), (100, 300), (50,), (300,)])
def test_the_directory_of_another_run_is_refused(tmp_path, capsys, steps):
    save(tmp_path / "a", random_tensors(1), step=100)
    for step in steps:
        save(tmp_path / "b", random_tensors(2 + step), step=step)
    before = contents(tmp_path / "b")
    assert tool(tmp_path / "a", tmp_path / "b") == 1
    assert "--allow-existing" in capsys.readouterr().err
    assert contents(tmp_path / "b") == before


def test_a_damaged_checkpoint_of_the_same_step_is_not_replaced(tmp_path):
    save(tmp_path / "a", random_tensors(1), step=100)
    path = save(tmp_path / "b", random_tensors(1), step=100) / "model-pp00-tp00-dp00.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    before = contents(tmp_path / "b")
    assert tool(tmp_path / "a", tmp_path / "b") == 1
    assert contents(tmp_path / "b") == before


def test_the_same_command_may_run_again(tmp_path):
    save(tmp_path / "a", random_tensors(1), step=100)
    for _ in range(2):
        assert tool(tmp_path / "a", tmp_path / "b", "--grow", "ffn=48") == 0
    assert tool(tmp_path / "a", tmp_path / "b", "--grow", "ffn=60") == 1


def test_the_option_allows_it(tmp_path):
    save(tmp_path / "a", random_tensors(1), step=100)
    save(tmp_path / "b", random_tensors(2), step=100)
    assert tool(tmp_path / "a", tmp_path / "b", "--allow-existing") == 0
    assert same(read_all(tmp_path / "b"), random_tensors(1))


def test_an_import_is_not_written_among_the_checkpoints_of_a_run(tmp_path, capsys):
    checkpoint = save_small_model(tmp_path)
    export = ["--from", "megatron_tf", "--to", "hf", "--skip-check", "--load", str(checkpoint)]
    assert convert_checkpoint.main([*export, "--save", str(tmp_path / "hf")]) == 0
    save(tmp_path / "b", random_tensors(2), step=0)
    before = contents(tmp_path / "b")
    back = ["--from", "hf", "--to", "megatron_tf", "--load", str(tmp_path / "hf")]
    assert convert_checkpoint.main([*back, "--save", str(tmp_path / "b")]) == 1
    assert contents(tmp_path / "b") == before
    assert convert_checkpoint.main([*back, "--save", str(tmp_path / "hf" / "run")]) == 1
    assert "is inside --load" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["step_00000000", "step_00000000/grown", "step_00000000/a/b"])
def test_nothing_is_written_inside_a_checkpoint(tmp_path, capsys, place):
    source = save_small_model(tmp_path)
    inside = source.parent / place
    export = ["--load", str(source), "--save", str(inside), "--from", "megatron_tf", "--to"]
    write_data_set(tmp_path / "data", [[1, 2, 3]])
    figures = [str(source), "--data-path", str(tmp_path / "data"), "--output", str(inside / "figures.json")]
    for main, arguments in (
        (reshard_checkpoint.main, ["--load", str(source.parent), "--save", str(inside), "--grow", "ffn=128"]),
        (convert_checkpoint.main, [*export, "official"]),
        (convert_checkpoint.main, [*export, "hf", "--skip-check"]),
        (evaluate.main, figures),
    ):
        assert main(arguments) == 1
        assert "choose another" in capsys.readouterr().err
    CheckpointReader(source).verify()
