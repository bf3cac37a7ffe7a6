"""SIGTERM, SIGUSR1 and a time limit: the run saves at the next step, exits with code 75, and resumes bit for bit."""

import os
import re
import signal
from pathlib import Path

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from tests.support.commands import make_run, run
from tests.support.paths import ROOT
from tests.support.runs import derive_run, ranks_of, start_run

STEPS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that takes some seconds."""
    return make_run(
        tmp_path_factory.mktemp("stop"),
        training={"train_iters": STEPS, "micro_batch_size": 4},
        logging={"log_interval": 100},
    )


@pytest.fixture(scope="module")
def straight(folder):
    """Without a stop."""
    assert run("megatron_tf.pretrain", derive_run(folder, "straight")).returncode == 0
    return folder / "straight"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=str)
def test_a_signal_stops_it_and_it_resumes_bit_for_bit(folder, straight, number):
    name = f"stopped-{number}"
    process = start_run(derive_run(folder, name))
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert f"stopped by {number.name}, saved in" in out
    step = CheckpointReader(folder / name).step
    assert 0 < step < STEPS
    again = run("megatron_tf.pretrain", derive_run(folder, name))
    assert again.returncode == 0
    assert f"at step {step}" in again.stdout
    assert list(differences(CheckpointReader(straight), CheckpointReader(folder / name))) == []


def documented(processes):
    """Those that the `pkill -f` of docs/running.md finds."""
    [pattern] = re.findall(r"`pkill -USR1 -f '([^']+)'`", (ROOT / "docs" / "running.md").read_text())
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in processes}
    return [pid for pid, line in lines.items() if re.search(pattern, line)]


@pytest.mark.parametrize("to", ["agent", "one worker", "what the documented command finds"])
def test_all_ranks_under_torchrun_stop_together(folder, to):
    """SIGTERM to torchrun, which hands it on, or SIGUSR1 to a single rank, or to all of them but not to torchrun."""
    name = f"ranks-{to}"
    process = start_run(derive_run(folder, name), ranks=2)
    if to == "agent":
        process.send_signal(signal.SIGTERM)
    elif to == "one worker":
        os.kill(ranks_of(process.pid)[0], signal.SIGUSR1)
    else:
        workers = ranks_of(process.pid)
        assert documented([process.pid, *workers]) == workers
        for worker in workers:
            os.kill(worker, signal.SIGUSR1)
    out, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    reader = CheckpointReader(folder / name)
    reader.verify()
    assert 0 < reader.step < STEPS
    assert "stopped by SIG" in out


def test_it_ends_when_its_time_is_up(folder):
    config = derive_run(folder, "timed", training={"train_iters": 1_000_000, "exit_duration_in_mins": 0.08})
    done = run("megatron_tf.pretrain", config)
    assert done.returncode == 75, done.stderr
    assert "stopped by its time limit" in done.stdout
    assert CheckpointReader(folder / "timed").step > 0


def test_a_limit_of_time_without_a_place_to_save_is_refused(folder):
    options = ["--training.exit_duration_in_mins=1", "--checkpoint.save=null"]
    done = run("megatron_tf.pretrain", folder / "run.yaml", *options)
    assert done.returncode == 1
    assert "exit_duration_in_mins needs checkpoint.save" in done.stderr
