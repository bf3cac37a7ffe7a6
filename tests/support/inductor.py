"""Checks whether inductor can build kernels on this machine."""

import functools
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PROBE = """
import torch
from megatron_tf.kernels.build_failure import describe_build_failure, is_build_failure

try:
    torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(8))
except Exception as error:
    if not is_build_failure(error):
        raise
    print(describe_build_failure("compiled", error))
"""


def require_inductor():
    """Skip the test, with the reason, if inductor can't build; test_kernel_builds.py tests what a run does then."""
    if reason := _build_failure():
        pytest.skip(reason)


@functools.cache
def _build_failure():
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return done.stdout.strip()
