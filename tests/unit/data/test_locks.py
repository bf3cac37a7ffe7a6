"""Locks between processes that work on one data set: a wait is bounded and announced."""

import fcntl

import pytest

from megatron_tf.data import locks
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.locks import locked
from megatron_tf.data.order_cache import open_or_build


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A file that somebody else has locked."""
    monkeypatch.setattr(locks, "_SILENT_SECONDS", 0.1)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield tmp_path / "lock"


def test_a_wait_is_announced_once_and_ends(held, caplog):
    with pytest.raises(DataError, match="lock: it is busy"), locked(held, timeout=1.2, busy="it is busy"):
        pass
    assert caplog.text.count(f"{held}: another process holds this lock: waiting up to 1 s for it") == 1
    assert held.exists()


def test_nothing_is_said_where_no_wait_is_wanted_or_needed(held, caplog):
    with pytest.raises(DataError, match="it is busy"), locked(held, timeout=0, busy="it is busy"):
        pass
    with locked(held.with_name("other"), timeout=9, busy="it is busy"):
        pass
    assert caplog.text == ""


def test_a_file_in_place_of_the_cache_of_orders_is_named_with_its_key(tmp_path):
    (tmp_path / "file").write_text("")
    message = rf"^data.data_cache_path: {tmp_path}/file can't be made \(File exists\): choose another directory$"
    with pytest.raises(DataError, match=message):
        open_or_build(tmp_path / "file", ("any",), lambda: pytest.fail("built"))
