"""Fixtures shared by several folders."""

import contextlib
import gc
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

# a background job of a shell ignores Ctrl-C, and so would all processes that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# code of exported models goes here instead of the user's cache; transformers reads it once, when it is imported
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
# and our own caches too
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a long value after its length: every worker of xdist must find the same names, and gzip holds the time."""
    return f"{argname}-of-{len(val)}" if isinstance(val, str | bytes) and len(val) > 100 else None


def pytest_collection_finish():
    """Exempt modules and collected tests from collections of garbage."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Seed torch before a test and its fixtures, so that it draws the same numbers whatever ran before."""
    torch.manual_seed(SEED)


@pytest.fixture(scope="session", autouse=True)
def _modules_cache():
    """Remove the cache directories at the end."""
    yield
    for name in ("HF_MODULES_CACHE", "XDG_CACHE_HOME"):
        shutil.rmtree(os.environ[name], ignore_errors=True)


@pytest.fixture(scope="session")
def rank_pool():
    """Provide eight gloo ranks, started once."""
    pool = RankPool(8)
    yield pool
    pool.close()
