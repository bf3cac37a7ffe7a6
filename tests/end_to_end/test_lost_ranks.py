"""A rank that dies, freezes or dawdles ends the job within the time-out; the error names it, its host and its work."""

import os
import signal
import socket
import sys
import time

import pytest

from tests.support.commands import ENVIRONMENT, free_port, make_run
from tests.support.paths import ROOT
from tests.support.processes import PythonProcess

LIMIT = 8
MINUTE = 60
# runs a rank whose seventh batch of eight samples does what the first argument says, on one rank
VICTIM = """
import os, signal, sys, time
import torch
from megatron_tf import pretrain
from megatron_tf.data.lane_samples import LaneSamples

read, count, deed = LaneSamples.read, 0, sys.argv[1]

def harm(self, sample):
    global count
    count += 1
    if os.environ["RANK"] == os.environ["VICTIM"] and count == 6 * 8 + 1:
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif deed == "dawdle":
            time.sleep(3600)
        elif deed == "fail":
            raise OSError(5, "Input/output error", "data.bin")
        elif deed == "exhaust":
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which "
                "1.03 GiB is free. Including non-PyTorch memory, this process has 78.08 GiB memory in use."
            )
        elif deed == "disconnect":
            raise RuntimeError("forward failed") from torch.distributed.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:93, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL "
                "version 2.28.9\\nLast error:\\nCall to ibv_modify_qp failed with 110 Connection timed out"
            )
    return read(self, sample)

LaneSamples.read = harm
sys.exit(pretrain.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("lost"), training={"train_iters": 100_000})


def start(folder, deed, victim=1):
    """Start two ranks, of which `victim` does what the deed says."""
    (folder / "victim.py").write_text(VICTIM)
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "VICTIM": str(victim)}
    options = ["--parallel.tensor_model_parallel_size=2", f"--parallel.distributed_timeout_seconds={LIMIT}"]
    command = [sys.executable, str(folder / "victim.py"), deed, str(folder / "run.yaml"), *options]
    return [
        PythonProcess(
            command,
            environment={**ENVIRONMENT, **places, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    "deed, messages",
    [
        ("die", ["rank 1", "is gone or frozen"]),
        ("freeze", ["rank 1", "is gone or frozen"]),
        ("dawdle", ["rank 1", "keeps the others waiting, in data of step 7"]),
        (
            "fail",
            [
                "[rank 1] error: data.bin: Input/output error",
                "rank 1",
                "has ended in data of step 7: [Errno 5]",
            ],
        ),
        (
            "exhaust",
            [
                "[rank 1] error: out of memory on GPU 1 of host",
                "(2.00 GiB requested, 1.03 GiB of 79.11 GiB free): lower training.micro_batch_size, set ",
                "has ended in data of step 7: out of memory on GPU 1",
            ],
        ),
        (
            "disconnect",
            [
                "(NCCL: Call to ibv_modify_qp failed with 110 Connection timed out): restart with NCCL_DEBUG=INFO",
                "has ended in data of step 7: NCCL: Call to ibv_modify_qp failed",
            ],
        ),
    ],
)
def test_it_is_named(folder, deed, messages):
    ranks = start(folder, deed)
    began = time.monotonic()
    try:
        _, error = ranks[0].communicate(timeout=MINUTE + LIMIT)
    finally:
        if deed == "freeze":
            os.kill(ranks[1].pid, signal.SIGCONT)
        ranks[1].kill()
    _, error_of_victim = ranks[1].communicate(timeout=MINUTE)
    assert ranks[0].returncode == 1
    assert time.monotonic() - began < MINUTE + LIMIT
    for message in [*messages, f"host {socket.gethostname()}", "step"]:
        assert message in error + error_of_victim
    assert "[rank 0] error: rank 1" in error
    assert "Traceback" not in error


def test_the_rank_that_hosts_the_store_is_named_when_it_freezes(folder):
    frozen, other = start(folder, "freeze", victim=0)
    try:
        _, error = other.communicate(timeout=MINUTE + LIMIT)
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
        frozen.kill()
    frozen.communicate(timeout=MINUTE)
    assert other.returncode == 1
    assert "error: the rank that hosts the run's store, usually rank 0, is gone or frozen (the limit of" in error
