"""Everything that reads the checkpoint of an fp64 run: loading, growth, exports and the commands."""

import dataclasses
import importlib.util
import json

import pytest
import torch

import megatron_tf
from megatron_tf import evaluate, generate
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.config import GrowthStage
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.run.checkpointing import save_state
from megatron_tf.training.run.resume import Resume
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.conversion import convert
from tests.support.data import write_data_set
from tests.support.models import random_model, write_checkpoint
from tests.support.records import NO_TOKENIZER
from tests.support.toy import read_all
from tests.support.training import random_batch, small_run

ONE_PROCESS = Mesh(torch.device("cpu"))
IDS = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(3))


def fp64_model(**keys):
    """A model whose parameters have digits that fp32 does not have."""
    model = random_model(torch.float64, **keys)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The checkpoint of an fp64 run, and that of an fp32 run of the rounded parameters."""
    folder = tmp_path_factory.mktemp("pair")
    model = fp64_model()
    wide = write_checkpoint(folder / "wide", model)
    return wide, write_checkpoint(folder / "narrow", model.float())


def test_loading_keeps_every_bit_or_rounds_to_fp32(pair):
    wide, narrow = pair
    loaded, model = megatron_tf.load(wide, dtype=torch.float64), fp64_model()
    for (name, found), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name
        assert not torch.equal(found, found.float().double()), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))
        rounded = megatron_tf.load(wide)(IDS)
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, megatron_tf.load(narrow)(IDS))


def test_generation_and_evaluation_are_those_of_the_rounded_model(pair, tmp_path, capsys):
    data = write_data_set(tmp_path / "data", [list(b"the quick brown fox"), list(b"jumps over")])
    texts, figures = [], []
    for checkpoint in pair:
        capsys.readouterr()
        assert generate.main([str(checkpoint), "--prompt", "the", "--max-new-tokens", "8", "--seed", "3"]) == 0
        texts.append(capsys.readouterr().out)
        output = tmp_path / "figures.json"
        assert evaluate.main([str(checkpoint), "--data-path", str(data), "--output", str(output)]) == 0
        figures.append(json.loads(output.read_text())["all"])
    assert texts[0] == texts[1]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("target", ["official", "hf"])
def test_an_export_is_rounded_to_fp32_and_says_so(pair, target, tmp_path, capsys):
    has_transformers = all(map(importlib.util.find_spec, ("transformers", "google")))
    options = ["--skip-check"] if target == "hf" and not has_transformers else []
    files = []
    for checkpoint, is_wide in zip(pair, (True, False), strict=True):
        export = tmp_path / f"{is_wide}" / "model"
        assert convert("megatron_tf", target, checkpoint, export, *options) == 0
        said = f"{CheckpointReader(checkpoint).directory} is in fp64: its parameters are rounded to fp32\n"
        assert (said in capsys.readouterr().out) == is_wide
        files.append({path.name: path.read_bytes() for path in export.iterdir()})
    assert files[0] == files[1]


@pytest.mark.parametrize("target", ["official", "hf"])
def test_a_value_that_fp32_does_not_reach_is_not_exported(target, tmp_path, capsys):
    model = fp64_model()
    with torch.no_grad():
        model.transformer.get_parameter("final_norm.bias")[3] = 1e39
    checkpoint = write_checkpoint(tmp_path / "run", model)
    options = ["--skip-check"] if target == "hf" else []
    assert convert("megatron_tf", target, checkpoint, tmp_path / "model", *options) == 1
    assert "final_norm.bias holds 1e+39, which is too large for float32\n" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def tool(source, target, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(target), *map(str, options)])


DUPLICATE = ["--growth-init", "duplicate", "--growth-noise", "0.5"]
GROWTHS = {
    "zero keys": ("l2_norm_gelu", ["--grow", "qkv=40,proj=50,ffn=100"]),
    "zero keys after gelu": ("gelu_l2_norm", ["--grow", "qkv=40,proj=50,ffn=100"]),
    "copies": ("l2_norm_gelu", ["--grow", "qkv=96,proj=75,ffn=450", *DUPLICATE]),
    "copies after gelu": ("gelu_l2_norm", ["--grow", "qkv=96,proj=75,ffn=450", *DUPLICATE]),
    "copies under softmax": ("softmax", ["--grow", "qkv=96,proj=72,ffn=448", *DUPLICATE]),
    "layers": ("softmax", ["--insert-layers", "0,2"]),
    "width": ("gelu_l2_norm", ["--hidden-multiple", "3", "--growth-noise", "0.5"]),
    "width by half": ("softmax", ["--hidden-multiple", "1.5", "--growth-noise", "0.5"]),
    "width, copies and layers": (
        "l2_norm_gelu",
        ["--hidden-multiple", "2", "--grow", "qkv=96,ffn=450", "--insert-layers", "1", *DUPLICATE],
    ),
}


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize(("norm", "options"), GROWTHS.values(), ids=GROWTHS)
def test_exact_growth_moves_logits_by_rounding_in_fp64(norm, options, untied, tmp_path):
    model = fp64_model(norm_activation=norm, untie_embeddings_and_output_weights=untied)
    before = write_checkpoint(tmp_path / "a", model)
    assert tool(before, tmp_path / "b", *options, "--target-tensor-parallel-size", 1, "--verify") == 0
    after = megatron_tf.load(tmp_path / "b", dtype=torch.float64)
    with torch.no_grad():
        old, new = model(IDS), after(IDS)
    assert (old - new).abs().max() <= 1e-12 * old.abs().max()


def run_until(config, step):
    """Train from the newest checkpoint to `step` and save; returns the restored run."""
    run = Resume(
        config, ONE_PROCESS, tokenizer=NO_TOKENIZER, build=lambda staged: build_state(staged, ONE_PROCESS)
    ).restore()
    record = run.record
    while record.training.step < step:
        train_step(run.state, random_batch(config, record.training.step, ONE_PROCESS), 1e-3)
        record = record.after_step(8, 8 * 16, 0.0)
    return run, record


def test_a_run_grows_to_the_bits_that_the_tool_writes(tmp_path):
    stage = {"at_step": 2, "qkv_tokens": 96, "ffn_tokens": 200, "init": "duplicate", "noise": 0.5}
    config = small_run(training={"precision": "fp64"}, checkpoint={"save": tmp_path / "run"})
    run, record = run_until(config, 2)
    save_state(run.state, config, record, root=tmp_path / "run")
    grown, _ = run_until(dataclasses.replace(config, growth=[GrowthStage(**stage)]), 2)
    assert grown.stage == 1
    assert tool(tmp_path / "run", tmp_path / "offline", "--grow", "qkv=96,ffn=200", *DUPLICATE) == 0
    offline = read_all(tmp_path / "offline")
    groups = {"model": grown.state.shards}
    groups |= {moment: grown.state.optimizer.moments(moment) for moment in ("exp_avg", "exp_avg_sq")}
    for group, shards in groups.items():
        for shard in shards:
            assert shard.tensor.dtype == torch.float64
            assert torch.equal(shard.tensor, offline[group][shard.name]), (group, shard.name)
