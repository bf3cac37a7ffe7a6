"""The slurm example on a real cluster of one node: time limits, signals, scancel, growth, a rank that dies."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from tests.support.commands import ENVIRONMENT, make_run, run
from tests.support.paths import ROOT
from tests.support.runs import derive_run, wait_for_steps
from tests.support.slurm import slurm_cluster, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

ENDLESS = 100_000
WAIT = 120


@pytest.fixture(scope="module")
def cluster():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with slurm_cluster({**ENVIRONMENT, "PATH": path, "PYTHONPATH": str(ROOT)}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("slurm"), logging={"log_interval": 1})


def configure(folder, name, *, growth=(), **sections):
    return derive_run(folder, name, growth=growth, checkpoint={"save_interval": 20}, **sections)


def submit(cluster, folder, name, *options):
    """The number of the job that runs NAME.yaml by the example, on two ranks of one node."""
    here = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", f"--chdir={ROOT}"]
    log = f"--output={folder / name}.log"
    return cluster.submit(*here, log, *options, ROOT / "examples/slurm/pretrain.sbatch", folder / f"{name}.yaml")


def losses(folder, name):
    """Step -> loss, of the last time that the step was done."""
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def ranks_of(config):
    """Process -> rank, of the run of this configuration."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"megatron_tf.pretrain" in command and b"srun" not in command and str(config).encode() in command:
            place = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)
            found[int(process.name)] = int(place[b"SLURM_PROCID"])
    return found


@pytest.fixture(scope="module")
def at_the_limit(cluster, folder):
    """Name -> job, of two whose time runs while the other tests do. Slurm warns up to a minute earlier than it is told
    to, and counts in minutes."""
    options = {"warned": ["--time=2", "--signal=USR1@30"], "unwarned": ["--time=1", "--signal=CONT@1"]}
    jobs = {}
    for name, times in options.items():
        configure(folder, name, training={"train_iters": ENDLESS})
        jobs[name] = submit(cluster, folder, name, "--ntasks-per-node=1", *times)  # one rank: others need the cores
    return jobs


def test_a_requeued_job_resumes_bit_for_bit(cluster, folder, at_the_limit):
    straight = configure(folder, "straight", training={"train_iters": 200})
    assert run("megatron_tf.pretrain", straight, ranks=2).returncode == 0
    configure(folder, "signalled", training={"train_iters": 200})
    job = submit(cluster, folder, "signalled")
    wait_for_steps(folder, "signalled", 5, seconds=WAIT, log=folder / "signalled.log")
    cluster.run("scancel", "--signal=USR1", job)
    ended = cluster.wait(job, "COMPLETED", "FAILED")
    log = (folder / "signalled.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "stopped by SIGUSR1, saved in" in log
    assert losses(folder, "signalled") == losses(folder, "straight")


def test_growth_into_another_layout_requeues_the_job(cluster, folder, at_the_limit):
    stage = {"at_step": 3, "ffn_tokens": 128, "tensor_model_parallel_size": 2}
    configure(folder, "grown", growth=[stage], training={"train_iters": 6})
    job = submit(cluster, folder, "grown")
    ended = cluster.wait(job, "COMPLETED", "FAILED")
    log = (folder / "grown.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "tp 1 x pp 1 x dp 2" in log
    assert "tp 2 x pp 1 x dp 1" in log
    assert sorted(losses(folder, "grown")) == [1, 2, 3, 4, 5, 6]


def test_scancel_saves_and_does_not_requeue(cluster, folder, at_the_limit):
    configure(folder, "cancelled", training={"train_iters": ENDLESS})
    job = submit(cluster, folder, "cancelled")
    wait_for_steps(folder, "cancelled", 5, seconds=WAIT, log=folder / "cancelled.log")
    cluster.run("scancel", job)
    ended = cluster.wait(job, "CANCELLED")
    assert ended["Restarts"] == "0"
    assert CheckpointReader(folder / "cancelled").step == max(losses(folder, "cancelled"))
    assert "stopped by SIGTERM, saved in" in (folder / "cancelled.log").read_text()


def test_a_rank_that_dies_ends_the_job_and_the_next_one_resumes(cluster, folder, at_the_limit):
    parallel = {"distributed_timeout_seconds": 20}
    config = configure(folder, "lost", training={"train_iters": 200}, parallel=parallel)
    job = submit(cluster, folder, "lost")
    wait_for_steps(folder, "lost", 41, seconds=WAIT, log=folder / "lost.log")  # saves of 20 end before those of 40
    (victim,) = (process for process, rank in ranks_of(config).items() if rank == 1)
    os.kill(victim, signal.SIGKILL)
    ended = cluster.wait(job, "FAILED", "COMPLETED", seconds=90)
    log = (folder / "lost.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log
    assert "[rank 0] error: rank 1" in log
    assert not ranks_of(config)
    step = CheckpointReader(folder / "lost").step
    assert step >= 20
    again = cluster.wait(submit(cluster, folder, "lost"), "FAILED", "COMPLETED")
    log = (folder / "lost.log").read_text()
    assert again["JobState"] == "COMPLETED", log
    assert f"at step {step}" in log


def test_a_job_that_is_warned_of_its_time_limit_is_requeued_and_resumes(cluster, folder, at_the_limit):
    job, log = at_the_limit["warned"], folder / "warned.log"
    limit = time.monotonic() + 2 * WAIT
    while not (resumed := re.search(r"stopped by SIGUSR1, saved in.*?at step (\d+)", log.read_text(), re.DOTALL)):
        assert time.monotonic() < limit, log.read_text()[-2000:]
        time.sleep(0.5)
    stopped = re.search(r"step +(\d+)  stopped by SIGUSR1", log.read_text())
    assert stopped[1] == resumed[1]
    assert int(cluster.job(job)["Restarts"]) >= 1
    cluster.run("scancel", job)


def test_a_job_at_its_time_limit_is_saved(cluster, folder, at_the_limit):
    ended = cluster.wait(at_the_limit["unwarned"], "TIMEOUT", seconds=WAIT)
    assert ended["Restarts"] == "0"
    assert "stopped by SIGTERM, saved in" in (folder / "unwarned.log").read_text()
    assert CheckpointReader(folder / "unwarned").step == max(losses(folder, "unwarned"))


def test_two_jobs_on_one_node_do_not_meet(cluster, folder):
    names = ("first", "second")
    for name in names:
        configure(folder, name, training={"train_iters": 100})
    jobs = [submit(cluster, folder, name) for name in names]
    ended = [cluster.wait(job, "COMPLETED", "FAILED")["JobState"] for job in jobs]
    assert ended == ["COMPLETED", "COMPLETED"], [(folder / f"{name}.log").read_text() for name in names]
    assert losses(folder, "first") == losses(folder, "second")
