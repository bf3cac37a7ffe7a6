"""Signals at any moment of a run: while it starts, in an evaluation, at its last step; Ctrl-C once and twice."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from tests.support.commands import ENVIRONMENT, make_run, run
from tests.support.processes import PythonProcess, run_python
from tests.support.runs import WAIT, derive_run, wait_for_files, wait_for_steps

ENDLESS = 100_000
# sends this process a signal when a batch of training (0) or evaluation (1) is computed for the given time
SENDER = """
import os, sys
from megatron_tf import pretrain
from megatron_tf.training.run import loop

number, kind, count = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
name = ("train_step", "evaluation_loss")[kind]
compute = getattr(loop, name)

def send(*arguments, **options):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), number)
    return compute(*arguments, **options)

setattr(loop, name, send)
sys.exit(pretrain.main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("signals"), training={"train_iters": 4}, logging={"log_interval": 1})
    (folder / "sender.py").write_text(SENDER)
    return folder


def configure(folder, name, *, saves=True, **training):
    return derive_run(folder, name, training=training, checkpoint={} if saves else {"save": None})


def wait_until_caught(process, number):
    """Until the process handles the signal."""
    limit = time.monotonic() + WAIT
    while time.monotonic() < limit:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.005)


def send_within(folder, number, kind, count, config):
    """The finished run that sends itself a signal."""
    command = [sys.executable, folder / "sender.py", str(int(number)), str(kind), str(count), config]
    return run_python(command, environment=ENVIRONMENT, timeout=WAIT)


def validation_losses(folder, name):
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=str)
@pytest.mark.parametrize("saves", [True, False], ids=["with a checkpoint", "without"])
def test_a_signal_while_python_imports_ends_the_run_with_one_line(start, folder, number, saves):
    process = start(
        sys.executable, "-m", "megatron_tf.pretrain", configure(folder, "early", saves=saves, train_iters=ENDLESS)
    )
    wait_until_caught(process, signal.SIGUSR2)  # the last that is set; Python itself catches SIGINT
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(number)
    out, error = process.communicate(timeout=WAIT)
    expected = 130 if number == signal.SIGINT else 75 if saves else 128 + number
    assert process.returncode == expected, error
    assert "Traceback" not in error
    assert "start the same command again" in out + error


def test_a_stop_without_a_checkpoint_is_not_one_to_continue(start, folder):
    process = start(
        sys.executable, "-m", "megatron_tf.pretrain", configure(folder, "unsaved", saves=False, train_iters=ENDLESS)
    )
    wait_for_steps(folder, "unsaved")
    process.terminate()
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 143
    assert "stopped by SIGTERM, not saved: no checkpoint.save" in out


def test_a_stop_in_an_evaluation_is_noticed_at_the_next_batch_and_the_evaluation_made_up_for(folder):
    options = {"train_iters": 4, "eval_interval": 2, "eval_iters": 3}
    assert run("megatron_tf.pretrain", configure(folder, "straight", **options)).returncode == 0
    config = configure(folder, "evaluating", **options)
    stopped = send_within(folder, signal.SIGTERM, 1, 2, config)  # the second batch of the first evaluation
    assert stopped.returncode == 75, stopped.stderr
    assert CheckpointReader(folder / "evaluating").step == 2
    assert validation_losses(folder, "evaluating") == {}
    assert run("megatron_tf.pretrain", config).returncode == 0
    assert validation_losses(folder, "evaluating") == validation_losses(folder, "straight")


def test_a_stop_at_the_last_step_drops_no_evaluation(folder):
    config = configure(folder, "last", train_iters=3, eval_interval=100, eval_iters=2)
    stopped = send_within(folder, signal.SIGTERM, 0, 3, config)
    assert stopped.returncode == 75, stopped.stderr
    again = run("megatron_tf.pretrain", config)
    assert again.returncode == 0, again.stderr
    assert list(validation_losses(folder, "last")) == [3]
    before = (folder / "last.jsonl").read_text().count("validation_loss")
    assert run("megatron_tf.pretrain", config).returncode == 0
    assert (folder / "last.jsonl").read_text().count("validation_loss") == before


def test_the_first_interrupt_saves_and_says_so_in_one_line(start, folder):
    process = start(sys.executable, "-m", "megatron_tf.pretrain", configure(folder, "interrupted", train_iters=ENDLESS))
    wait_for_steps(folder, "interrupted")
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert error == ""
    step = CheckpointReader(folder / "interrupted").step
    assert out.splitlines()[-1].split() == (
        f"step {step} stopped by Ctrl-C, saved in {folder / 'interrupted'}: start the same command again".split()
    )


def test_the_second_interrupt_ends_the_run_at_once(folder):
    config = configure(folder, "twice", train_iters=ENDLESS)
    asleep = folder / "asleep"
    sleep = f"import time; open({str(asleep)!r}, 'w').close(); time.sleep(600)"
    program = (folder / "sender.py").read_text().replace("os.kill(os.getpid(), number)", sleep)
    (folder / "sleeper.py").write_text(program)
    process = PythonProcess([sys.executable, folder / "sleeper.py", "0", "0", "4", config], environment=ENVIRONMENT)
    wait_for_files(asleep)  # before that, one signal ends the run
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=5)
    assert process.returncode == 130
    assert len(error.splitlines()) == 1


def test_train_iters_below_the_step_of_the_checkpoint_end_the_run(folder):
    config = configure(folder, "lowered", train_iters=4)
    assert run("megatron_tf.pretrain", config).returncode == 0
    for places in ([], ["--checkpoint.save=null", f"--checkpoint.load={folder / 'lowered'}"]):
        done = run("megatron_tf.pretrain", config, "--training.train_iters=3", *places)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "is at step 4 of training.train_iters (3)" in done.stderr


def test_a_run_that_is_done_says_that_nothing_is_left_to_do(folder):
    config = configure(folder, "done", train_iters=4)
    assert run("megatron_tf.pretrain", config).returncode == 0
    places = [f"--checkpoint.load={folder / 'done'}", f"--checkpoint.save={folder / 'elsewhere'}"]
    for options in ([], places):
        again = run("megatron_tf.pretrain", config, *options)
        assert again.returncode == 0
        assert "nothing is left to do" in again.stdout


def test_a_second_run_into_the_same_directory_is_refused_and_the_first_unharmed(start, folder):
    config = configure(folder, "shared", train_iters=ENDLESS)
    first = start(sys.executable, "-m", "megatron_tf.pretrain", config)
    wait_for_steps(folder, "shared")
    second = run("megatron_tf.pretrain", config)
    assert second.returncode == 1
    assert len(second.stderr.splitlines()) == 1
    assert f"another run is writing to {folder / 'shared'} (process {first.pid} on" in second.stderr
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # ended, but left as a zombie: its lock is still a file
    again = run("megatron_tf.pretrain", config, "--training.train_iters=2")
    first.communicate()
    assert again.returncode == 0, again.stderr
