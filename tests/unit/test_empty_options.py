"""Options that a shell variable left empty are refused, by every tool: nothing is written where nobody meant it."""

import pytest

from megatron_tf import evaluate, generate, pretrain
from megatron_tf.commands import (
    build_index,
    convert_checkpoint,
    dry_run,
    inspect_checkpoint,
    inspect_dataset,
    merge_datasets,
    plot_run,
    preprocess_data,
    reshard_checkpoint,
    schedule,
    train_tokenizer,
)
from tests.support.conversion import save_small_model


@pytest.mark.parametrize(
    "option, message",
    [
        ("--grow=", "--grow: unknown kind ''"),
        ("--grow= ", "--grow: unknown kind ''"),
        ("--grow=,", "--grow: unknown kind ''"),
        ("--grow=ffn=", "--grow"),
        ("--insert-layers=", "--insert-layers '': write layer indices"),
        ("--insert-layers=1,", "--insert-layers '1,': write layer indices"),
        ("--make-vocab-size-divisible-by=0", "--make-vocab-size-divisible-by is 0: it must be 1 or more"),
        ("--make-vocab-size-divisible-by=-8", "--make-vocab-size-divisible-by is -8: it must be 1 or more"),
        ("--shrink=", "--shrink needs --data PREFIX"),
        ("--target-tensor-parallel-size=0", "the target's parallel sizes must be 1 or more"),
    ],
)
def test_an_empty_change_of_a_model_is_no_copy(tmp_path, capsys, option, message):
    checkpoint = save_small_model(tmp_path)
    arguments = ["--load", str(checkpoint), "--save", str(tmp_path / "out"), option]
    try:
        code = reshard_checkpoint.main(arguments)
    except SystemExit as exit_of_usage:
        code = exit_of_usage.code
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert message in error
    assert len([line for line in error.splitlines() if "error: " in line]) == 1
    assert not (tmp_path / "out").exists()


PATHS = [
    (reshard_checkpoint, ["--load", "run", "--save", "out"], ["--load", "--save", "--stage", "--data"]),
    (
        convert_checkpoint,
        ["--from", "official", "--to", "megatron_tf", "--load", "a", "--save", "b"],
        ["--load", "--save"],
    ),
    (convert_checkpoint, ["--from", "megatron_tf", "--to", "hf", "--load", "a", "--save", "b"], ["--data"]),
    (convert_checkpoint, ["--from", "hf", "--to", "megatron_tf", "--load", "a", "--save", "b"], ["--tokenizer-model"]),
    (generate, ["run", "--prompt", "a"], ["--output", "--tokenizer-model"]),
]
POSITIONS = [
    pretrain,
    generate,
    evaluate,
    inspect_checkpoint,
    inspect_dataset,
    build_index,
    plot_run,
    dry_run,
    schedule,
]


@pytest.mark.parametrize("tool, arguments, option", [(t, a, o) for t, a, options in PATHS for o in options])
def test_an_empty_path_of_an_option_is_named(tmp_path, monkeypatch, capsys, tool, arguments, option):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_of_usage:
        tool.main([*arguments, f"{option}="])
    assert exit_of_usage.value.code == 2
    assert f"{option}: is empty: write a path, or leave the option out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", POSITIONS, ids=lambda tool: tool.__name__)
def test_an_empty_path_of_a_command_is_named(tmp_path, monkeypatch, capsys, tool):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_of_usage:
        tool.main([""])
    assert exit_of_usage.value.code == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [preprocess_data, train_tokenizer, merge_datasets])
def test_an_empty_output_is_named(tmp_path, monkeypatch, capsys, tool):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    arguments = ["--input", "in.jsonl", "--output-prefix="]
    arguments += ["--tokenizer-type", "NullTokenizer"] if tool is preprocess_data else []
    with pytest.raises(SystemExit) as exit_of_usage:
        tool.main(arguments)
    assert exit_of_usage.value.code == 2
    assert "--output-prefix: is empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
