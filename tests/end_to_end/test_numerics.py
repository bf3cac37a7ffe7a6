"""A run with everything that changes on the way (loss scale, batch size, dropout), stopped and started again."""

import json

import pytest

from tests.support.commands import make_run, run
from tests.support.damage import change_metadata

SECTIONS = {
    "training": {
        "train_iters": 6,
        "rampup_batch_size": [2, 2, 16],
        "precision": "fp16",
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "deterministic": True,
    },
    "loss_scale": {"initial_loss_scale": 2.0**22, "hysteresis": 1, "loss_scale_window": 2},
    "optimizer": {"lr_decay_tokens": 600, "lr_warmup_tokens": 100},
}
KEYS = ("step", "tokens", "loss", "grad_norm", "learning_rate", "loss_scale")


FP64 = {
    "training": {"train_iters": 6, "precision": "fp64", "eval_interval": 2, "eval_iters": 2},
    "optimizer": {"lr_decay_iters": 6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("numerics"), **SECTIONS)


@pytest.fixture(scope="module")
def fp64_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("fp64"), **FP64)


def steps(folder, name, lengths):
    """What each step reports, in jobs that end after so many steps."""
    metrics = folder / f"{name}.jsonl"
    for length in lengths:
        options = [f"--checkpoint.save={folder / name}", f"--logging.metrics_file={metrics}"]
        done = run("megatron_tf.pretrain", folder / "run.yaml", *options, f"--training.train_iters={length}")
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    overflows = sum(line.get("event") == "overflow" for line in lines)
    return [[line[key] for key in KEYS] for line in lines if "loss" in line], overflows


def test_it_resumes_bit_for_bit(folder):
    straight, overflows = steps(folder, "straight", [6])
    assert (steps(folder, "stopped", [2, 6])) == (straight, overflows)
    assert overflows > 0
    sizes = [
        (b - a) // 16
        for a, b in zip([0, *(line[1] for line in straight)], (line[1] for line in straight), strict=False)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 8
    assert len({line[5] for line in straight}) > 1


def test_a_checkpoint_with_other_masks_is_resumed_with_one_warning(folder):
    steps(folder, "older", [2])
    (metadata,) = (folder / "older").glob("step_*")
    change_metadata(metadata, lambda values: values["run"].pop("dropout"))
    said = []
    for length in (3, 4):
        options = [f"--checkpoint.save={folder / 'older'}", f"--training.train_iters={length}"]
        done = run("megatron_tf.pretrain", folder / "run.yaml", *options)
        assert done.returncode == 0, done.stderr
        said.append((done.stdout + done.stderr).count("other elements are dropped"))
    assert said == [1, 0]


def test_an_fp64_run_resumes_bit_for_bit(fp64_folder):
    lines = []
    for name, lengths in (("straight", [6]), ("stopped", [2, 6])):
        metrics = fp64_folder / f"{name}.jsonl"
        for length in lengths:
            options = [f"--checkpoint.save={fp64_folder / name}", f"--logging.metrics_file={metrics}"]
            done = run("megatron_tf.pretrain", fp64_folder / "run.yaml", *options, f"--training.train_iters={length}")
            assert done.returncode == 0, done.stderr
            assert "rounds its tensors" not in done.stdout + done.stderr
        found = [json.loads(line) for line in metrics.read_text().splitlines()]
        keys = ("step", "loss", "grad_norm", "validation_loss")
        measured = [line for line in found if "loss" in line or "validation_loss" in line]
        lines.append([{key: line[key] for key in keys if key in line} for line in measured])
    assert lines[0] == lines[1]
    assert sum("validation_loss" in line for line in lines[0]) == 3


def test_an_fp64_checkpoint_is_rounded_with_one_warning(fp64_folder):
    done = run("megatron_tf.pretrain", fp64_folder / "run.yaml", f"--checkpoint.save={fp64_folder / 'wide'}")
    assert done.returncode == 0, done.stderr
    options = [f"--checkpoint.load={fp64_folder / 'wide'}", f"--checkpoint.save={fp64_folder / 'narrow'}"]
    said = []
    for length in (7, 8):
        narrow = ["--training.precision=fp32", f"--training.train_iters={length}"]
        done = run("megatron_tf.pretrain", fp64_folder / "run.yaml", *options, *narrow)
        assert done.returncode == 0, done.stderr
        said.append((done.stdout + done.stderr).count("training.precision=fp32 rounds its tensors to fp32"))
    assert said == [1, 0]
