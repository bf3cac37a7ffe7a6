"""--help of every command and of the configuration: type or choices, default and meaning of each key."""

import dataclasses
import importlib
import re
import typing

import pytest

from megatron_tf.commands.registry import COMMANDS
from megatron_tf.config import DataPhase, RunConfig
from megatron_tf.config.describe import describe_keys, type_name
from megatron_tf.config.types import Count
from megatron_tf.help_text import Item, layout

OURS = [entry.module for name, entry in COMMANDS.items() if name not in ("torchrun", "lm-eval")]
"""Modules of the commands whose options are ours."""
FIRST_LINE = re.compile(
    r"  (?P<name>\S(?:.*?\S)?)  +(?P<type>\S(?:.*?\S)?)  +(?P<default>required|optional|default .+)"
)


def entries(block):
    """{name: (type, default, meaning)} of a block of --help, whose columns must be aligned."""
    found, columns, name = {}, set(), ""
    for line in block.splitlines():
        if line.startswith(" " * 6):
            *first, meaning = found[name]
            found[name] = (*first, f"{meaning} {line.strip()}".strip())
        elif line.startswith("  "):
            match = FIRST_LINE.fullmatch(line)
            assert match, line
            name = match["name"]
            found[name] = match["type"], match["default"], ""
            columns.add((match.start("type"), match.start("default")))
    assert len(columns) <= 1
    assert all(meaning for _, _, meaning in found.values())
    return found


def help_of(module, capsys):
    with pytest.raises(SystemExit) as exit_of_help:
        importlib.import_module(f"megatron_tf.commands.{module}").main(["--help"])
    assert exit_of_help.value.code == 0
    return capsys.readouterr().out


def options_in(text):
    """Entries of all groups of options, without the keys of the configuration."""
    found = {}
    for block in re.split(r"\n\n(?=[^ ].*:.*\n  \S)", text.partition("Keys of the configuration")[0])[1:]:
        found |= entries(block.partition("\n\n")[0])
    return found


@pytest.mark.parametrize("module", OURS)
def test_each_option_has_type_default_and_meaning_in_columns(module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(module, capsys)
    usage, _, rest = text.partition("\n\n")
    found = options_in("\n\n" + rest)
    named = set(re.findall(r"--[a-z][a-z-]*", usage))
    assert named <= {re.match(r"--[a-z-]+", name)[0] for name in found if name.startswith("--")}
    assert found["-h, --help"][:2] == ("flag", "optional")


def test_an_option_shows_its_choices_and_default(capsys):
    found = options_in(help_of("generate", capsys))
    assert found["--dtype"] == ("fp32 | bf16", "default fp32", "type of weights and activations")
    assert found["--num-samples"][:2] == ("int", "default 1")
    assert found["--stop"][:2] == ("text, repeatable", "optional")
    assert found["checkpoint"][:2] == ("path", "required")
    assert options_in(help_of("preprocess_data", capsys))["--json-keys"][:2] == ("text ...", "optional")


def test_each_key_of_the_configuration_has_type_default_and_meaning():
    expected = {}
    for section in dataclasses.fields(RunConfig):
        kind = typing.get_args(section.type)
        prefix = "" if kind else f"--{section.name}."
        keys = dataclasses.fields(kind[0] if kind else section.type)
        expected[section.name] = [f"{prefix}{key.name}" for key in keys]
        if section.name == "data":
            expected["data.phases"] = [key.name for key in dataclasses.fields(DataPhase)]
    texts = (text.partition("\n") for text in describe_keys().strip().split("\n\n"))
    assert {title.partition(":")[0]: list(entries(text)) for title, _, text in texts} == expected


def test_types_and_defaults_of_keys_are_those_that_a_file_takes():
    model, training, *rest = (entries(text.partition("\n")[2]) for text in describe_keys().strip().split("\n\n"))
    keys = {name: entry for section in (model, training, *rest) for name, entry in section.items()}
    assert keys["--model.norm_activation"][:2] == ("l2_norm_gelu | gelu_l2_norm | softmax", "default l2_norm_gelu")
    assert keys["--model.num_layers"][:2] == ("int > 0, <= 100000", "required")
    assert keys["--model.untie_embeddings_and_output_weights"][:2] == ("true | false", "default false")
    assert keys["--training.attention_dropout"][:2] == ("float >= 0, < 1", "default 0.0")
    assert keys["--checkpoint.save"][:2] == ("path | null", "default null")
    assert keys["--data.split"][:2] == ("text", "default 969,30,1")
    assert keys["insert_layers"][:2] == ("[int >= 0, ...]", "default []")
    assert type_name(tuple[Count, Count]) == "[int > 0, int > 0]"
    assert type_name(dict[str, float]) == "{text: float}"


def test_meanings_are_wrapped_and_keep_their_indentation(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    lines = layout([Item("--key", "int", "default 1", "word " * 30), Item("--longer_key", "a | b", "required", "it")])
    assert lines[0] == "  --key         int    default 1"
    assert lines[-2] == "  --longer_key  a | b  required"
    assert all(len(line) <= 50 for line in lines)
    assert all(line.startswith(" " * 6) for line in lines[1:-2])
    assert len(lines) > 4
