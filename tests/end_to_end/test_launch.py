"""The launch examples start real ranks, and all launchers give the same run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.parallel import launch
from tests.support.commands import ENVIRONMENT, free_port, make_run
from tests.support.paths import ROOT

OPTIONS = ["--parallel.tensor_model_parallel_size=2", "--logging.log_interval=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def expected(folder):
    """By torchrun on one node."""
    done = start(folder, "torchrun/pretrain.sh", "torchrun", "2")
    out, _ = done.communicate(timeout=120)
    assert done.returncode == 0, out
    return CheckpointReader(folder / "torchrun")


def start(folder, script, name, *places):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ["bash", f"examples/{script}", str(folder / "run.yaml"), *places]
    return subprocess.Popen(
        [*script, f"--checkpoint.save={folder / name}", *OPTIONS],
        cwd=ROOT,
        env={**ENVIRONMENT, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_torchrun_on_two_nodes(folder, expected):
    places = ["2", "1", f"127.0.0.1:{free_port()}"]
    nodes = [start(folder, "torchrun/pretrain_multi_node.sh", "nodes", *places) for _ in range(2)]
    outs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert list(differences(expected, CheckpointReader(folder / "nodes"))) == []


@pytest.mark.skipif(shutil.which("mpiexec", path=Path(sys.executable).parent) is None, reason="no mpiexec here")
def test_mpi(folder, expected):
    done = start(folder, "mpi/pretrain.sh", "mpi", "2")
    out, _ = done.communicate(timeout=180)
    assert done.returncode == 0, out
    assert "tp 2 x pp 1 x dp 1" in out
    assert list(differences(expected, CheckpointReader(folder / "mpi"))) == []


def test_without_mpi4py_it_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(launch.LaunchError, match=r"pip install '\.\[mpi\]' in a clone .*, or start with torchrun"):
        launch.adopt_launcher()


def test_a_rank_that_dies_is_started_again_and_the_run_resumes(folder, expected):
    """torchrun's restart: rank 1 dies after the second step of the first attempt."""
    script = folder / "dies.py"
    script.write_text(
        "import os, signal, sys\n"
        "from megatron_tf import pretrain\n"
        "from megatron_tf.training.run import loop\n"
        "step, count = loop.train_step, 0\n"
        "def die(*arguments, **options):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 3 and (os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == ('1', '0'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(*arguments, **options)\n"
        "loop.train_step = die\n"
        "sys.exit(pretrain.main(sys.argv[1:]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    options = [f"--checkpoint.save={folder / 'again'}", "--checkpoint.save_interval=1", *OPTIONS]
    command = [*torchrun, str(script), str(folder / "run.yaml"), *options]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert list(differences(expected, CheckpointReader(folder / "again"))) == []


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"])
def test_slurm_tasks_know_their_number_by_any_of_its_variables(monkeypatch, name):
    for other in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_NTASKS"):
        monkeypatch.delenv(other, raising=False)
    facts = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1230042", "MASTER_ADDR": "here", name: "2"}
    for key, value in facts.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what is adopted is gone after the test
    launch.adopt_launcher()
    places = [os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
    assert places == ["1", "2", "1", "20042"]


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"SLURM_PROCID": "1"}, "their number is unknown: export SLURM_NTASKS"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2(x3)"}, r"SLURM_NTASKS is '2\(x3\)', which is not a number"),
    ],
)
def test_slurm_tasks_of_which_nothing_says_the_number_do_not_train_alone(monkeypatch, facts, message):
    for other in ("RANK", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"):
        monkeypatch.delenv(other, raising=False)
    for key, value in facts.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(launch.LaunchError, match=message):
        launch.adopt_launcher()
