"""A run with everything that changes on the way (loss scale, batch size, dropout), stopped and started again."""

import json

import pytest

from tests.support.commands import make_run, run

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("numerics"), **SECTIONS)


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


def test_it_goes_on_bit_for_bit(folder):
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
