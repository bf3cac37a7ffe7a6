"""kill -9 in the middle of a step's micro-batches or of an evaluation: when restarted, the run resumes bit for bit."""

import json
import shutil
import signal
import sys

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from tests.support.commands import ENVIRONMENT, make_run, run
from tests.support.processes import run_python

# dies when a micro-batch of training (0) or evaluation (1) is run for the given time
VICTIM = """
import os, signal, sys
from megatron_tf import pretrain
from megatron_tf.model.tokenformer import TokenFormer

where, count = int(sys.argv[1]), int(sys.argv[2])
forward = TokenFormer.forward

def die(self, *arguments, **options):
    global count
    import torch
    count -= torch.is_grad_enabled() == (where == 0)
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *arguments, **options)

TokenFormer.forward = die
sys.exit(pretrain.main(sys.argv[3:]))
"""
OPTIONS = ["--training.eval_interval=2", "--training.eval_iters=2", "--checkpoint.save_interval=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("resume"), training={"train_iters": 4})
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"data_text_document{suffix}", folder / f"other{suffix}")
    (folder / "victim.py").write_text(VICTIM)
    return folder


@pytest.fixture(scope="module")
def straight(folder):
    """(checkpoint, losses) of the run that nobody kills."""
    done = run("megatron_tf.pretrain", folder / "run.yaml", *options_of(folder, "straight"))
    assert done.returncode == 0, done.stderr
    return CheckpointReader(folder / "straight"), losses(folder, "straight")


def options_of(folder, name):
    blend = f"--data.data_path=['0.7 {folder / 'data_text_document'}', '0.3 {folder / 'other'}']"
    return [*OPTIONS, blend, f"--checkpoint.save={folder / name}", f"--logging.metrics_file={folder / name}.jsonl"]


def losses(folder, name):
    """What each step and evaluation measured, as it was measured the last time."""
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    keys = ("loss", "validation_loss", "grad_norm")
    return {(line["step"], key): line[key] for line in lines for key in keys if "event" not in line and key in line}


@pytest.mark.parametrize(
    "where, count", [(0, 8 * 2 + 5), (1, 8 * 2 + 3)], ids=["fifth micro-batch of step 3", "second evaluation"]
)
def test_it_resumes_bit_for_bit(folder, straight, where, count):
    expected, measured = straight
    name = f"killed-{where}"
    command = [sys.executable, folder / "victim.py", str(where), str(count), folder / "run.yaml"]
    killed = run_python([*command, *options_of(folder, name)], environment=ENVIRONMENT)
    assert killed.returncode == -signal.SIGKILL
    assert CheckpointReader(folder / name).step < 4
    again = run("megatron_tf.pretrain", folder / "run.yaml", *options_of(folder, name))
    assert again.returncode == 0, again.stderr
    assert list(differences(expected, CheckpointReader(folder / name))) == []
    assert losses(folder, name) == measured
