"""A rank that dies, freezes or dawdles ends the job within the time-out; the error names it, its host and its work."""

import os
import signal
import socket
import sys
import time

import pytest

from tests.support.commands import ENVIRONMENT, make_run
from tests.support.paths import ROOT
from tests.support.processes import PythonProcess

LIMIT = 8
MINUTE = 60
# runs a rank whose seventh batch of eight samples does what the first argument says, on rank 1 alone
VICTIM = """
import os, signal, sys, time
from megatron_tf import pretrain
from megatron_tf.data.gpt_dataset import GPTDataset

read, count, deed = GPTDataset.__getitem__, 0, sys.argv[1]

def harm(self, sample):
    global count
    count += 1
    if os.environ["RANK"] == "1" and count == 6 * 8 + 1:
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif deed == "dawdle":
            time.sleep(3600)
        elif deed == "fail":
            raise OSError(5, "Input/output error", "data.bin")
    return read(self, sample)

GPTDataset.__getitem__ = harm
sys.exit(pretrain.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("lost"), training={"train_iters": 100_000})


@pytest.mark.parametrize(
    "deed, messages",
    [
        ("die", ["rank 1", "is gone or frozen"]),
        ("freeze", ["rank 1", "is gone or frozen"]),
        ("dawdle", ["rank 1", "keeps the others waiting, in data of step 7"]),
        (
            "fail",
            [
                "[rank 1] error: [Errno 5] Input/output error: 'data.bin'",
                "rank 1",
                "has ended in data of step 7: [Errno 5]",
            ],
        ),
    ],
)
def test_it_is_named(folder, deed, messages):
    (folder / "victim.py").write_text(VICTIM)
    port = socket.socket()
    port.bind(("127.0.0.1", 0))
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": "2"}
    port.close()
    options = ["--parallel.tensor_model_parallel_size=2", f"--parallel.distributed_timeout_seconds={LIMIT}"]
    command = [sys.executable, str(folder / "victim.py"), deed, str(folder / "run.yaml"), *options]
    ranks = [
        PythonProcess(
            command,
            environment={**ENVIRONMENT, **places, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]
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
