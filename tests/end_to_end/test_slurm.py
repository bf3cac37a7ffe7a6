"""The slurm example with `srun` and `scontrol` that start real ranks: it stops, requeues itself and resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_tf.checkpoint.load import CheckpointReader
from tests.support.commands import ENVIRONMENT, make_run
from tests.support.paths import ROOT

SRUN = """#!/usr/bin/env python
import os, subprocess, sys
command = [part for part in sys.argv[1:] if not part.startswith("--kill-on-bad-exit")]
ranks = int(os.environ["SLURM_NTASKS"])
places = [dict(os.environ, SLURM_PROCID=str(r), SLURM_LOCALID=str(r)) for r in range(ranks)]
tasks = [subprocess.Popen(command, env=place) for place in places]
open(os.environ["TASKS"], "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1" in
    show) echo localhost; echo elsewhere ;;
    requeue) echo "$2" >>"$QUEUE" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path):
    """(environment, configuration, where requeued jobs are written down)."""
    make_run(tmp_path, training={"train_iters": 300})
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    values["checkpoint"] |= {"save": str(tmp_path / "saved")}
    values["logging"] |= {"metrics_file": str(tmp_path / "metrics.jsonl"), "log_interval": 50}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]"}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    files = {"QUEUE": str(tmp_path / "queue"), "TASKS": str(tmp_path / "tasks")}
    return {**ENVIRONMENT, **slurm, **files, "PATH": path, "PYTHONPATH": str(ROOT)}, tmp_path


def submit(environment, folder):
    script = ["bash", "examples/slurm/pretrain.sbatch", str(folder / "run.yaml")]
    return subprocess.Popen(
        script, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_it_queues_itself_again_and_resumes(cluster):
    environment, folder = cluster
    job, metrics, limit = submit(environment, folder), folder / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert time.monotonic() < limit, "it does not start"
        time.sleep(0.05)
    for task in (folder / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    out, _ = job.communicate(timeout=90)
    assert job.returncode == 75, out
    assert (folder / "queue").read_text() == "4711\n"
    step = CheckpointReader(folder / "saved").step
    assert 0 < step < 300
    again = submit(environment, folder)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    assert f"at step {step}" in out
    assert CheckpointReader(folder / "saved").step == 300
    assert (folder / "queue").read_text() == "4711\n"


def test_an_error_does_not_queue_it_again(cluster):
    environment, folder = cluster
    (folder / "run.yaml").write_text("nonsense: 1\n")
    job = submit(environment, folder)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "unknown key 'nonsense'" in out
    assert not (folder / "queue").exists()
