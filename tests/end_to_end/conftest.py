"""Fixtures of the commands, run as a user runs them."""

import contextlib
import os
import signal
import subprocess

import pytest

from tests.support.commands import ENVIRONMENT
from tests.support.paths import ROOT
from tests.support.runs import children_of


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
        for part in [process.pid, *children_of(process.pid)]:  # each rank is in a group of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part, signal.SIGKILL)
        process.wait()
