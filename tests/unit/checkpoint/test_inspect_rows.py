"""The command inspect-checkpoint --rows: what each growth's tokens contribute on a text, and how many are dead."""

import re

import pytest
import torch
from torch import nn

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.commands import inspect_checkpoint
from megatron_tf.config import GrowthStage
from megatron_tf.growth.grow import grow
from megatron_tf.inference.model import load_model
from megatron_tf.layers.linear import MLP
from megatron_tf.layers.pattention import Pattention
from tests.support.conversion import save_small_model
from tests.support.data import write_tokenizer
from tests.support.models import random_model, write_checkpoint
from tests.support.toy import target

TEXT = "the quick brown fox jumps over the lazy dog"
TRANSFORMER = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
STAGES = {
    "tokenformer": GrowthStage(ffn_tokens={"0": 96}, qkv_tokens=40, insert_layers=[1]),
    "transformer": GrowthStage(ffn_tokens=80),
}


def grown(folder, layer="tokenformer", **stage):
    """A checkpoint of random values that has grown."""
    model = random_model(**({} if layer == "tokenformer" else TRANSFORMER))
    base = CheckpointReader(write_checkpoint(folder / "base", model))
    stage = GrowthStage(**stage) if stage else STAGES[layer]
    return reshard(grow(base, stage), folder / "grown", target(1, 1), check_source=base.verify)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def inspect(*arguments):
    return inspect_checkpoint.main([str(argument) for argument in arguments])


def contributions_by_hand(path, seq_length):
    """Module -> norm of each token's contribution, token by token, averaged over the bytes of the text."""
    model, squares = load_model(path, dtype=torch.float64), {}

    def record(module, inputs, name):
        x = inputs[0].flatten(0, -2)
        if isinstance(module, MLP):
            weights, values = nn.functional.gelu(x @ module.up.weight.t()), module.down.weight
        else:
            scores = x @ module.key_tokens.t()
            weights = nn.functional.gelu(module.tau * scores / scores.norm(dim=1, keepdim=True))
            values = module.value_tokens
        norms = [float(torch.outer(w, v).norm()) ** 2 for w, v in zip(weights.t(), values, strict=True)]
        squares[name] = [a + b for a, b in zip(squares.get(name, [0.0] * len(norms)), norms, strict=True)]

    for name, module in model.transformer.named_modules():
        if isinstance(module, Pattention | MLP):
            module.register_forward_pre_hook(lambda m, x, name=name: record(m, x, name))
    ids = torch.tensor([list(TEXT.encode())])
    with torch.no_grad():
        for start in range(0, len(TEXT), seq_length):
            model(ids[:, start : start + seq_length])
    return {name: [(value / len(TEXT)) ** 0.5 for value in values] for name, values in squares.items()}


def parsed(out):
    """(layer, kind, growth) -> [tokens, contribution, dead] of the printed table."""
    rows = re.findall(r"^ +(\d+)  (\w+) +(\d+) +([\d,]+) +(\S+) +([\d,]+) +[\d.]+%$", out, re.MULTILINE)
    return {
        (int(layer), kind, int(growth)): [int(tokens), float(contribution), int(dead)]
        for layer, kind, growth, tokens, contribution, dead in rows
    }


@pytest.mark.parametrize("layer", ["tokenformer", "transformer"])
def test_it_prints_sums_over_tokens(tmp_path, text, capsys, layer):
    path = grown(tmp_path, layer)
    assert inspect(path, "--rows", "--input", text) == 0
    out = capsys.readouterr().out
    reader = CheckpointReader(path)
    generations, expected = reader.record.generations, {}
    for name, values in contributions_by_hand(path, reader.record.seq_length).items():
        kind = "qkv" if name.endswith(("query", "key", "value")) else name.rpartition(".")[2]
        median = sorted(values)[(len(values) - 1) // 2]
        rows = f"{name}.down.weight" if layer == "transformer" else f"{name}.value_tokens"
        start = 0
        for run in generations.runs(rows, len(values)):
            sums = expected.setdefault((int(name.split(".")[1]), kind, run.generation.growth), [0, 0.0, 0])
            for value in values[start : start + run.count]:
                sums[0] += 1
                sums[1] += value**2
                sums[2] += value <= 0.01 * median
            start += run.count
    found = parsed(out)
    assert found.keys() == expected.keys()
    for key, (tokens, square, dead) in expected.items():
        assert found[key] == pytest.approx([tokens, square**0.5, dead], rel=1e-3), key
    lines = out.splitlines()
    dead, tokens = (sum(values[i] for (_, _, growth), values in found.items() if growth == 1) for i in (2, 0))
    assert lines[-1] == f"growth 1: {dead:,} of {tokens:,} tokens are dead ({dead / tokens:.1%})"
    assert dead >= 32 + (3 * 3 * 8 if layer == "tokenformer" else 0)  # zero keys
    assert lines[0].endswith(f"{len(TEXT)} tokens of {text}")


def test_it_draws_a_panel_for_each_kind(tmp_path, text, monkeypatch):
    figure, axes = pytest.importorskip("matplotlib.figure"), []

    class Kept(figure.Figure):
        def savefig(self, *arguments, **options):
            axes.extend(self.axes)
            return super().savefig(*arguments, **options)

    monkeypatch.setattr(figure, "Figure", Kept)
    assert inspect(grown(tmp_path), "--rows", "--input", text, "--plot", tmp_path / "plots" / "rows.png") == 0
    assert (tmp_path / "plots" / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert [panel.get_title() for panel in axes] == ["ffn", "proj", "qkv", "", "", ""]
    assert [[line.get_label() for line in panel.lines] for panel in axes] == [["original", "growth 1"]] * 6
    below = axes[3].lines
    assert list(below[1].get_xdata()) == [0, 1]  # the layer with new tokens, and the new layer
    assert list(below[1].get_ydata()) == [1.0, 1.0]


def test_mistakes_are_one_line(tmp_path, text, capsys):
    path, empty = grown(tmp_path), tmp_path / "empty.txt"
    empty.write_text("")
    for arguments, message in [
        (["--rows"], "--rows needs --input TEXT: contributions are measured on the text of a file"),
        (["--input", text], "--input needs --rows"),
        (["--plot", tmp_path / "a.png"], "--plot needs --rows"),
        (["--rows", "--input", text, "--diff", path], "--rows and --diff are two reports: run the tool twice"),
        (["--rows", "--input", text, "--plot", text], f"--plot {text} would replace --input: choose another file"),
        (["--rows", "--input", empty], f"--input {empty} is empty: contributions are measured on its text"),
        (["--rows", "--input", text, "--plot", path / "a.png"], f"--plot {path / 'a.png'} is inside the checkpoint"),
    ]:
        assert inspect(path, *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1
    assert text.read_text() == TEXT
    assert inspect(path, "--rows", "--input", text, "--plot", tmp_path / "a.wrong") == 1
    assert f"error: --plot {tmp_path / 'a.wrong'}: Format 'wrong' is not supported" in capsys.readouterr().err


def test_a_model_that_has_diverged_is_refused(tmp_path, text, capsys):
    model = random_model()
    with torch.no_grad():
        model.transformer.layers["1"].ffn.value_tokens[3, 0] = torch.inf
    assert inspect(write_checkpoint(tmp_path / "base", model), "--rows", "--input", text) == 1
    error = capsys.readouterr().err
    assert error == (
        "error: layers.1.ffn has infinite or NaN contributions: the checkpoint is damaged or has diverged\n"
    )


def test_another_tokenizer_is_refused(tmp_path, text, capsys):
    path, other = save_small_model(tmp_path), write_tokenizer(tmp_path / "other.json", 20)
    text.write_text("w1 w5 w7 w5")
    assert inspect(path, "--rows", "--input", text) == 0
    assert f"4 tokens of {text}" in capsys.readouterr().out
    assert inspect(path, "--rows", "--input", text, "--tokenizer-model", other) == 1
    assert f"error: {other} is not the tokenizer that the model" in capsys.readouterr().err
