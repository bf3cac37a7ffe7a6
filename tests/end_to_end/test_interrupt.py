"""Ctrl-C ends every command with one line and exit code 130."""

import signal
import subprocess
import sys

import pytest

from megatron_tf.__main__ import COMMANDS
from tests.support.commands import ENVIRONMENT, ROOT

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
    module.replace("megatron_tf.tools.", "tools/") + ".py" if ".tools." in module else module
    for command, (module, _) in COMMANDS.items()
    if command not in ("pretrain", "lm-eval")  # the trainer saves first; the harness reads its own options
]


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
