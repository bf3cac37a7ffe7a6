"""Saving in the background: what is written is what was there at the call, and failures are told."""

import threading
from functools import partial

import pytest
import torch

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.save import Retention, save_checkpoint
from megatron_tf.parallel.sharding import RowShard
from tests.support.toy import record


def begin(saver, root, step, rows, save=save_checkpoint):
    shard = RowShard("w", tuple(rows.shape), 0, len(rows), rows, True)
    keep = Retention(keep_last=2)
    saver.save(partial(save, root, step, record=record(step), writer_label="all", retention=keep), {"model": [shard]})


def test_what_changes_after_the_call_is_not_written(tmp_path):
    """The writer is held back until the values have changed."""
    changed, saved = threading.Event(), []

    def held_back(*arguments, **options):
        assert changed.wait(10)
        return save_checkpoint(*arguments, **options)

    rows = torch.ones(4, 3)
    with BackgroundSaver(None, saved.append, pytest.fail) as saver:
        begin(saver, tmp_path, 1, rows, held_back)
        assert not (tmp_path / "latest").exists()
        rows.fill_(2)
        changed.set()
        begin(saver, tmp_path, 2, rows, held_back)
        assert CheckpointReader(tmp_path / "step_00000001").read_rows("model", "w", start=0, stop=4).eq(1).all()
    assert CheckpointReader(tmp_path).read_rows("model", "w", start=0, stop=4).eq(2).all()
    assert [path.name for path in saved] == ["step_00000001", "step_00000002"]


def test_a_failure_is_told_at_once_and_raised_at_the_next_save(tmp_path):
    (tmp_path / "file").write_text("")
    told = threading.Event()
    reasons = []

    def tell(reason):
        reasons.append(reason)
        told.set()

    with BackgroundSaver(None, pytest.fail, tell) as saver:
        begin(saver, tmp_path / "file", 1, torch.ones(4, 3))
        assert told.wait(10)
        assert "saving failed on rank 0" in reasons[0]
        with pytest.raises(CheckpointError, match="saving failed on rank 0"):
            begin(saver, tmp_path, 2, torch.ones(4, 3))


def fail_while_saving(root, on_failure):
    with BackgroundSaver(None, lambda path: None, on_failure) as saver:
        begin(saver, root, 1, torch.ones(4, 3))
        raise KeyError("of the run")


def test_an_error_of_the_run_is_not_hidden_and_the_save_is_completed(tmp_path):
    with pytest.raises(KeyError, match="of the run"):
        fail_while_saving(tmp_path, pytest.fail)
    assert CheckpointReader(tmp_path).step == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyError, match="of the run"):
        fail_while_saving(tmp_path / "file", lambda reason: None)


def test_the_last_failure_is_raised_at_the_end(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="saving failed"),
        BackgroundSaver(None, pytest.fail, lambda reason: None) as saver,
    ):
        begin(saver, tmp_path / "file", 1, torch.ones(4, 3))


def test_an_unexpected_error_of_a_save_does_not_hide_that_of_the_run(tmp_path):
    def lose_a_rank(*arguments, **options):
        raise RuntimeError("gloo: connection closed by peer")

    def train():
        with BackgroundSaver(None, pytest.fail, lambda reason: None) as saver:
            begin(saver, tmp_path, 1, torch.ones(4, 3), lose_a_rank)
            raise KeyError("of the run")

    with pytest.raises(KeyError, match="of the run"):
        train()
