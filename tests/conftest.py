"""Fixtures that several folders share."""

import contextlib
import os
import shutil
import signal
import tempfile

import pytest
import torch

from tests.support.ranks import RankPool
from tests.support.seed import SEED

with contextlib.suppress(ImportError):  # the tests that need it are skipped
    from hypothesis import settings

    settings.register_profile("derandomized", derandomize=True)
    settings.load_profile("derandomized")

# a job in the background of a shell ignores Ctrl-C, and so would all that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# code of exported models goes here, and not into the user's cache; transformers reads it once, when it is imported
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Seed torch before a test and its fixtures, so that a test draws the same numbers whatever ran before it."""
    torch.manual_seed(SEED)


@pytest.fixture(scope="session", autouse=True)
def _modules_cache():
    """Removed at the end."""
    yield
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def rank_pool():
    """Eight gloo ranks, started once."""
    pool = RankPool(8)
    yield pool
    pool.close()
