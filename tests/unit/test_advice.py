"""Advice on a growth: what it says, when it warns, and that the tool prints it."""

from dataclasses import replace

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.config import GrowthStage, ModelConfig, grown_model
from megatron_tf.growth.advice import advise
from tests.support.grown import trained_checkpoint
from tests.support.records import make_record

D, V, S = 8, 16, 8
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=D,
    num_attention_heads=2,
    qkv_tokens=4,
    proj_tokens=6,
    ffn_tokens=10,
    vocab_size=V,
    make_vocab_size_divisible_by=V,
)


def size(ffn):
    """Parameters by hand: keys and values of three, one and one Pattention in two layers, a tied embedding, a norm."""
    return 2 * (2 * D * (3 * 4 + 6 + ffn)) + V * D + 2 * D


def flops(ffn):
    """Three passes of a multiplication and an addition, and attention to half of the samples on average."""
    return 3 * (2 * (2 * 2 * D * (3 * 4 + 6 + ffn) + 4 * D * S // 2) + 2 * V * D)


def advice(ffn, tokens=0):
    return advise(make_record(MODEL, step=1, tokens=tokens), grown_model(MODEL, GrowthStage(ffn_tokens=ffn)))


def test_it_says_the_factor_the_tokens_per_parameter_and_the_flops():
    (line,) = advice(ffn=20, tokens=10 * size(10))
    assert line == (
        f"growth factor {size(20) / size(10):.3g} ({size(10):,} to {size(20):,} parameters) after 10 tokens per "
        f"parameter; FLOPs per token in training: {flops(10):,} before, {flops(20):,} after"
    )


@pytest.mark.parametrize(
    ("ffn", "tokens", "reasons"),
    [
        (42, 20, None),  # 2 times the parameters, 20 tokens per parameter: just within both
        (43, 20, "beyond a factor of 2"),
        (42, 20.01, "after more than 20 tokens per parameter"),
        (100, 50, "beyond a factor of 2 and after more than 20 tokens per parameter"),
    ],
)
def test_it_warns_beyond_what_pays_most_reliably_with_the_source(ffn, tokens, reasons):
    lines = advice(ffn, int(tokens * size(10)))
    if reasons is None:
        assert size(ffn) <= 2 * size(10)
        assert len(lines) == 1
        return
    assert lines[1].startswith(f"warning: growing {reasons} pays less reliably")
    assert lines[1].endswith("(arXiv 2605.13405)")
    assert len(lines) == 2


@pytest.mark.parametrize("dry", [True, False])
def test_the_tool_prints_it_before_it_writes(tmp_path, capsys, dry):
    source = trained_checkpoint(tmp_path / "a")
    options = ["--load", str(source), "--save", str(tmp_path / "b"), "--grow", "ffn=512", *["--dry-run"] * dry]
    assert reshard_checkpoint.main(options) == 0
    record = CheckpointReader(source).record
    lines = advise(record, replace(record.model, ffn_tokens=512))
    assert "\n".join(lines) + "\n" in capsys.readouterr().out
    assert lines[1].startswith("warning: growing beyond a factor of 2 pays")
    assert (tmp_path / "b").exists() != dry


def test_a_change_of_the_layout_has_no_advice(tmp_path, capsys):
    source = trained_checkpoint(tmp_path / "a")
    options = ["--load", str(source), "--save", str(tmp_path / "b"), "--target-tensor-parallel-size", "2"]
    assert reshard_checkpoint.main([*options, "--dry-run"]) == 0
    assert "growth factor" not in capsys.readouterr().out
