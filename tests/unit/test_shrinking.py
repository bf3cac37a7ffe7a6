"""Shrinking by importance models of any origin: what is dropped, what the remaining rows keep, and what is undone."""

import pytest
import torch

from megatron_tf.checkpoint.generations import Generation
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.growth.shrink import keep_most_important, shrink
from megatron_tf.inference.model import load_model
from megatron_tf.model.contributions import unit_contributions
from megatron_tf.model.samples import read_samples
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support.grown import PLAIN, grow_by_stages, trained_checkpoint, write_text
from tests.support.models import SEQ_LENGTH, VOCAB, random_model
from tests.support.toy import read_all, same
from tests.support.training import STRONG


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


def tool(source, root, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(root), *map(str, options)])


UNDONE = {
    "once": ({}, [{"qkv_tokens": 40, "proj_tokens": 30, "ffn_tokens": 72}], "qkv=32,proj=24,ffn=64"),
    "twice": ({}, [{"ffn_tokens": 72}, {"ffn_tokens": 90, "qkv_tokens": 33}], "qkv=32,ffn=64"),
    "some layers": ({}, [{"ffn_tokens": {"1": 72}}], "ffn=64"),
    "another norm": ({"norm_activation": "gelu_l2_norm"}, [{"ffn_tokens": 72, "proj_tokens": 48}], "ffn=64,proj=24"),
    "MLP, zero keys": (PLAIN, [{"ffn_tokens": 100}], "ffn=64"),
    "MLP, zero values": (PLAIN, [{"ffn_tokens": 100, "mlp_init": "zero_value"}], "ffn=64"),
    "gated MLP": (STRONG, [{"ffn_tokens": 72}, {"ffn_tokens": 90, "mlp_init": "zero_value"}], "ffn=64"),
    "MLP, twice": (PLAIN, [{"ffn_tokens": 72}, {"ffn_tokens": 90, "mlp_init": "zero_value"}], "ffn=64"),
}


@pytest.mark.parametrize("case", UNDONE)
def test_shrinking_undoes_an_untrained_growth_bit_for_bit(case, tmp_path, text):
    keys, stages, request = UNDONE[case]
    before = trained_checkpoint(tmp_path / "before", **keys)
    large = grow_by_stages(before, tmp_path / "grown", *stages)
    assert CheckpointReader(large).record.generations is not None
    assert tool(large, tmp_path / "after", "--shrink", request, "--data", text, "--verify") == 0
    assert same(read_all(before), read_all(tmp_path / "after"))
    old, new = (CheckpointReader(path).record for path in (before, tmp_path / "after"))
    for key in ("model", "tau", "training", "generations"):
        assert getattr(new, key) == getattr(old, key)


def rows_of(record, name):
    """The generation of each row."""
    rows = model_parameters(record.model)[name].shape[0]
    return [run.generation for run in record.all_generations.runs(name, rows) for _ in range(run.count)]


@pytest.mark.parametrize("keys", [{}, PLAIN], ids=["tokens", "hidden units"])
def test_the_remaining_rows_keep_their_generations(keys, tmp_path):
    """Two growths that differ in everything a generation holds; every third unit is kept."""
    stages = [
        {"ffn_tokens": 72, "old_tokens_lr_scale": 0.5, "rewarmup_iters": 3},
        {"ffn_tokens": 90, "adam_state": "reset_second", "rewarmup": "new", "rewarmup_iters": 7},
    ]
    source = CheckpointReader(grow_by_stages(trained_checkpoint(tmp_path / "a", **keys), tmp_path / "b", *stages))
    kept = {f"layers.{i}.ffn": list(range(i, 90, 3)) for i in range(3)}
    small = shrink(source, kept)
    assert len({rows_of(source.record, small.names("model")[-3])[row].growth for row in (0, 64, 72)}) == 3
    for name, parameter in model_parameters(small.record.model).items():
        expected = rows_of(source.record, name)
        if parameter.module.startswith("ffn"):
            expected = expected[parameter.layer :: 3]
        assert rows_of(small.record, name) == expected
        for group in small.groups():
            whole = source.read_rows(group, name, start=0, stop=source.shape(group, name)[0])
            rows = small.read_rows(group, name, start=0, stop=parameter.shape[0])
            assert torch.equal(rows, whole[parameter.layer :: 3] if parameter.module.startswith("ffn") else whole)
    assert rows_of(small.record, "embedding.weight")[0] == Generation(
        exp_avg_steps=5, exp_avg_sq_steps=0, rewarmup_iters=3
    )


ORIGINS = {
    "duplicates": ({}, [{"ffn_tokens": 128, "init": "duplicate"}]),
    "copied layers": ({}, [{"num_layers": 5, "layer_init": "copy", "layer_order": "stacked"}]),
    "layers of several sizes": ({}, [{"ffn_tokens": {"0": 70, "2": 80}, "insert_layers": [1]}]),
    "several growths": ({}, [{"ffn_tokens": 80}, {"ffn_tokens": 160, "init": "duplicate", "insert_layers": [0]}]),
    "softmax": ({"norm_activation": "softmax"}, [{"ffn_tokens": 128, "init": "duplicate"}]),
    "MLP": (PLAIN, [{"ffn_tokens": 128, "mlp_init": "duplicate"}]),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_models_of_any_origin_keep_what_contributes_most(case, tmp_path, text, capsys):
    keys, stages = ORIGINS[case]
    large = grow_by_stages(trained_checkpoint(tmp_path / "a", **keys), tmp_path / "b", *stages)
    assert tool(large, tmp_path / "c", "--shrink", "ffn=40", "--data", text, "--verify") == 0
    assert "does not preserve the model's outputs" in capsys.readouterr().out
    model = load_model(large)
    samples = read_samples(text, vocab_size=VOCAB, seq_length=SEQ_LENGTH, num_tokens=16384)
    contributions = unit_contributions(model.transformer, samples)
    before, after = read_all(large), read_all(tmp_path / "c")
    record = CheckpointReader(tmp_path / "c").record
    assert record.model.ffn_tokens == 40
    for name, parameter in model_parameters(record.model).items():
        kept = slice(None)
        if parameter.module.startswith("ffn"):
            of_module = contributions[f"layers.{parameter.layer}.ffn"].tolist()
            kept = sorted(sorted(range(len(of_module)), key=lambda unit: (-of_module[unit], unit))[:40])
        for group in before:
            assert torch.equal(after[group][name], before[group][name][kept]), name


def test_layers_that_have_that_many_already_keep_all():
    model = random_model(ffn_tokens=[4, 4, 6]).config
    importance = {f"layers.{i}.ffn": torch.arange(float(count)) for i, count in enumerate([4, 4, 6])}
    kept = keep_most_important(model, importance, {"ffn": 4})
    assert kept == {"layers.0.ffn": [0, 1, 2, 3], "layers.1.ffn": [0, 1, 2, 3], "layers.2.ffn": [2, 3, 4, 5]}


@pytest.mark.parametrize(
    ("keys", "request_", "message"),
    [
        ({}, "ffn=65", "--shrink ffn=65: layers.0.ffn has only 64 tokens"),
        ({"ffn_tokens": [65, 65, 50]}, "ffn=60", "--shrink ffn=60: layers.2.ffn has only 50 tokens"),
        ({}, "qkv=32", "--shrink qkv=32: layers.0.attention.query has only 32 tokens"),
        (PLAIN, "qkv=8", "--shrink qkv=8: a model with layer: transformer has no qkv tokens"),
    ],
)
def test_requests_that_drop_nothing_are_refused(keys, request_, message, tmp_path, text, capsys):
    source = trained_checkpoint(tmp_path / "a", **keys)
    assert tool(source, tmp_path / "b", "--shrink", request_, "--data", text) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
