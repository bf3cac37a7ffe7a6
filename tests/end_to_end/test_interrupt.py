"""Ctrl-C ends every command with one line and exit code 130."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tf.commands.registry import COMMANDS
from tests.support.commands import ENVIRONMENT
from tests.support.paths import ROOT

# runs a command as a script, whose first work is interrupted
PROGRAM = """
import argparse, runpy, signal, sys

def interrupted(self, *arguments, **options):
    signal.raise_signal(signal.SIGINT)

argparse.ArgumentParser.parse_known_args = interrupted
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
SCRIPTS = [
    f"tools/{entry.module}.py" if entry.is_tool else f"megatron_tf.{entry.module}"
    for command, entry in COMMANDS.items()
    if command not in ("pretrain", "lm-eval")  # the trainer saves first; the harness reads its own options
]
COMPLETE = {
    "megatron_tf.torchrun": [],
    "tools/build_index.py": ["nowhere"],
    "tools/dry_run.py": ["examples/configs/tokenformer_150m.yaml", "--world-size", "1"],
    "tools/inspect_checkpoint.py": ["nowhere"],
    "tools/plot_run.py": ["nowhere", "--output", "nowhere"],
    "tools/reshard_checkpoint.py": ["--load", "nowhere", "--save", "nowhere"],
    "megatron_tf.generate": ["nowhere", "--prompt", "a"],
    "megatron_tf.evaluate": ["nowhere", "--data-path", "nowhere"],
    "tools/convert_checkpoint.py": ["--from", "megatron_tf", "--to", "hf", "--load", "nowhere", "--save", "nowhere"],
}
"""Arguments of the commands that import what takes seconds only after they have read these."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_that_is_interrupted_says_so_in_one_line(script):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, script],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("interrupted")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_that_is_interrupted_while_it_imports_says_so_in_one_line(start, script):
    name = [script] if script.endswith(".py") else ["-m", script]
    for command in (name, [*name, *COMPLETE.get(script, [])]):
        process = start(sys.executable, *command)
        wait_until_numpy_is_read(process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        if process.returncode == 2:
            continue  # it had nothing more to import before it found that arguments are missing
        assert process.returncode == 128 + signal.SIGINT, error
        assert len(error.splitlines()) == 1
        assert error.startswith("interrupted")


def wait_until_numpy_is_read(process):
    limit = time.monotonic() + 60
    while process.poll() is None and "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < limit
        time.sleep(0.001)
