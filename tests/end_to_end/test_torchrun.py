"""Runs on two ranks of torchrun, and of ours, which ends as its ranks do: Ctrl-C, signals, errors, exit codes."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from tests.support.commands import make_run
from tests.support.runs import WAIT, children_of, derive_run, wait_for_files, wait_for_steps

ENDLESS = 100_000
OURS, TORCHRUN = "megatron_tf.torchrun", "torch.distributed.run"
# a run whose fourth step takes ten minutes; each rank says when it has reached it
SLEEPER = """
import os, sys, time
from pathlib import Path
from megatron_tf import pretrain
from megatron_tf.training.run import loop

steps, compute = 0, loop.train_step

def train_step(*arguments, **options):
    global steps
    steps += 1
    if steps == 4:
        Path(sys.argv[1]).with_suffix(".asleep" + os.environ["RANK"]).touch()
        time.sleep(600)
    return compute(*arguments, **options)

loop.train_step = train_step
sys.exit(pretrain.main(sys.argv[1:]))
"""
# ranks that end as they are told to
ENDING = """
import os, signal, sys, time
how = sys.argv[1 + int(os.environ["RANK"])]
if how == "wait":
    time.sleep(600)
if how.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, how))
sys.exit(int(how))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_run(
        tmp_path_factory.mktemp("torchrun"), training={"train_iters": ENDLESS}, logging={"log_interval": 1}
    )
    (folder / "sleeper.py").write_text(SLEEPER)
    (folder / "ending.py").write_text(ENDING)
    return folder


def on_two_ranks(launcher):
    return [sys.executable, "-m", launcher, "--nproc-per-node", "2"]


def ending(start, folder, *how, options=()):
    """(exit code, standard error) of ranks that end so."""
    process = start(*on_two_ranks(OURS), *options, folder / "ending.py", *how)
    _, error = process.communicate(timeout=WAIT)
    return process.returncode, error


@pytest.mark.parametrize("launcher", [OURS, TORCHRUN])
def test_an_interrupt_saves_and_says_so(start, folder, launcher):
    process = start(*on_two_ranks(launcher), "-m", "megatron_tf.pretrain", derive_run(folder, launcher))
    wait_for_steps(folder, launcher)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=WAIT)
    step = CheckpointReader(folder / launcher).step
    assert out.splitlines()[-1].split() == (
        f"step {step} stopped by Ctrl-C, saved in {folder / launcher}: start the same command again".split()
    )
    if launcher == OURS:  # torchrun itself adds a traceback, and ends with 1
        assert (process.returncode, error) == (130, "")


@pytest.mark.parametrize("launcher", [OURS, TORCHRUN])
def test_the_second_interrupt_ends_all_ranks_at_once(start, folder, launcher):
    name = f"twice-{launcher}"
    config = derive_run(folder, name)
    process = start(*on_two_ranks(launcher), folder / "sleeper.py", config)
    wait_for_files(*(config.with_suffix(f".asleep{rank}") for rank in range(2)))
    ranks = children_of(process.pid)
    assert len(ranks) == 2
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=10)
    line = "interrupted a second time: exiting at once, without saving"
    assert error.count(line) == 1
    if launcher == OURS:
        assert (process.returncode, error) == (130, line + "\n")
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_an_interrupt_while_torchrun_is_imported_is_one_line(start, folder):
    process = start(*on_two_ranks(OURS), "-m", "megatron_tf.pretrain", derive_run(folder, "early"))
    limit = time.monotonic() + WAIT
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < limit, "it does not start"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert error == "interrupted: start the same command again\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=str)
def test_a_signal_to_the_launcher_is_for_the_ranks_to_save(start, folder, number):
    name = f"sent-{number}"
    process = start(*on_two_ranks(OURS), "-m", "megatron_tf.pretrain", derive_run(folder, name))
    wait_for_steps(folder, name)
    process.send_signal(number)
    out, error = process.communicate(timeout=WAIT)
    assert (process.returncode, error) == (128 + number, "")
    assert f"stopped by {number.name}, saved in" in out
    assert CheckpointReader(folder / name).step > 0


def test_an_error_of_the_ranks_is_the_last_that_is_read(start, folder):
    process = start(
        *on_two_ranks(OURS), "-m", "megatron_tf.pretrain", derive_run(folder, "wrong"), "--model.hidden_sise=3"
    )
    _, error = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    lines = error.splitlines()
    assert lines
    assert all(re.match(r"\[rank [01]\] error: .*hidden_sise", line) for line in lines)


def test_the_root_cause_of_torchrun_is_our_message(start, folder):
    wrong = "--model.hidden_sise=3"
    process = start(*on_two_ranks(TORCHRUN), "-m", "megatron_tf.pretrain", derive_run(folder, "cause"), wrong)
    _, error = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    said = [line for line in error.splitlines() if line.startswith("[rank ")]
    message = said[0].removeprefix("[rank 0] ").removeprefix("[rank 1] ")
    assert "unknown key 'model.hidden_sise'; did you mean 'hidden_size'?" in message
    assert sorted(said) == [f"[rank {rank}] {message}" for rank in range(2)]
    _, _, cause = error.partition("Root Cause (first observed failure):\n")
    assert cause.splitlines()[-2:] == [f"  traceback : {message}", "=" * 60]
    assert len(cause.splitlines()) == 8  # nothing of ours around it
    assert "To enable traceback see" not in error
    assert error.count("Traceback") == 1  # of torchrun itself, above its table


def test_the_exit_code_is_that_of_the_rank_that_failed_first(start, folder):
    assert ending(start, folder, "0", "0") == (0, "")
    assert ending(start, folder, "wait", "75") == (75, "")
    assert ending(start, folder, "3", "wait") == (3, "")


def test_a_rank_that_is_killed_is_named(start, folder):
    assert ending(start, folder, "wait", "SIGKILL") == (137, "error: rank 1 was ended by SIGKILL\n")


def test_a_rank_that_is_started_again_is_reported(start, folder):
    code, error = ending(start, folder, "wait", "7", options=["--max-restarts", "1"])
    assert code == 7
    assert error.count("exitcode: 7") == 2
    assert "Traceback" not in error


def test_a_request_for_a_trace_to_the_launcher_does_not_end_it(start, folder):
    process = start(*on_two_ranks(OURS), "-m", "megatron_tf.pretrain", derive_run(folder, "traced"))
    wait_for_steps(folder, "traced")
    process.send_signal(signal.SIGUSR2)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=WAIT)
    assert process.returncode == 128 + signal.SIGTERM
    assert error == "SIGUSR2 requests a trace if it is sent to a rank, not to the launcher\n"
