"""A run to Hugging Face and to the official format, back again, and on, through the command lines."""

import pytest
import torch

import megatron_tf
from megatron_tf.convert.huggingface.check import load_export
from tests.support import commands
from tests.support.commands import make_run, run
from tests.support.models import greedy_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run in `base`."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    done = run("megatron_tf.pretrain", folder / "run.yaml", f"--checkpoint.save={folder / 'base'}")
    assert done.returncode == 0, done.stderr
    return folder


def convert(source, target, load, save, *options):
    done = run(
        "tools/convert_checkpoint.py", "--from", source, "--to", target, "--load", load, "--save", save, *options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_on(folder, load, *options):
    """Resume training from a checkpoint for two steps, and return the output."""
    options = [f"--checkpoint.load={load}", f"--checkpoint.save={load}_on", *options]
    done = run("megatron_tf.pretrain", folder / "run.yaml", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_through_hugging_face_and_on(folder, monkeypatch):
    monkeypatch.setitem(commands.ENVIRONMENT, "HF_HOME", str(folder / "cache"))
    said = convert("megatron_tf", "hf", folder / "base", folder / "fox")
    assert "max |delta logit| between megatron_tf and transformers in float32" in said
    assert "no tokenizer files: transformers has none for a NullTokenizer" in said
    prompt = torch.tensor(list(b"the quick"))
    theirs = load_export(folder / "fox").generate(prompt[None], max_new_tokens=20, do_sample=False)
    (ours,) = greedy_ids(megatron_tf.load(folder / "base"), [prompt.tolist()], 20)
    assert theirs[0, len(prompt) :].tolist() == ours
    convert("hf", "megatron_tf", folder / "fox", folder / "back")
    longer = ["--training.train_iters=6", "--checkpoint.allow_changes=[training.train_iters]"]
    assert "at step 4" in train_on(folder, folder / "back", *longer)


def test_through_the_official_format_grown_and_on(folder):
    convert("megatron_tf", "official", folder / "base", folder / "official")
    facts = ["--num-attention-heads", "4", "--norm-activation", "l2_norm_gelu", "--tokenizer-type", "NullTokenizer"]
    binary = folder / "official" / "pytorch_model.bin"
    convert("official", "megatron_tf", binary, folder / "imported", *facts, "--seq-length", "16")
    options = ["--grow", "ffn=128", "--target-tensor-parallel-size", "2", "--verify"]
    grown = run("tools/reshard_checkpoint.py", "--load", folder / "imported", "--save", folder / "grown", *options)
    assert grown.returncode == 0, grown.stderr
    padding = "--model.make_vocab_size_divisible_by=264"  # as the official file has it
    said = train_on(folder, folder / "grown", "--training.train_iters=2", "--model.ffn_tokens=128", padding)
    assert "at step 0" in said
