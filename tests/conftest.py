"""Fixtures that several folders share."""

import pytest

from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool():
    """Eight gloo ranks, started once."""
    pool = RankPool(8)
    yield pool
    pool.close()
