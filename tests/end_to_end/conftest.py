"""Fixtures of the commands, run as a user runs them."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import ENVIRONMENT
from tests.support.paths import ROOT


@pytest.fixture
def start():
    """Starts a process in a group of its own, as a shell does. What of it is left after the test is killed."""
    started = []

    def start(*command):
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for part in [process.pid, *ranks_of(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part, signal.SIGKILL)
        process.wait()


def ranks_of(pid):
    """The processes that torchrun started, each in a group of its own."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []
