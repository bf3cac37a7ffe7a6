"""Copies that a save is written from: laid out in one block, and awaited on the thread that writes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.snapshot import HostCopies, copy_into
from megatron_tf.parallel.sharding import RowShard


def sources():
    """Of several types, of which one is empty, one has no element in order, and one begins in the middle of memory."""
    torch.manual_seed(0)
    return [
        torch.randn(3, 5),
        torch.randn(7, 2).bfloat16(),
        torch.empty(0, 4),
        torch.randn(4, 6).t(),
        torch.randn(129),
        torch.randn(9, 3, dtype=torch.float64)[2:],
    ]


def test_copies_share_a_block_and_no_byte_of_it():
    tensors = sources()
    block = torch.zeros(sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors), dtype=torch.uint8)
    copies = copy_into(block, tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()
    begin, end = block.data_ptr(), block.data_ptr() + block.nbytes
    assert all(begin <= copy.data_ptr() and copy.data_ptr() + copy.nbytes <= end for copy in copies if copy.nbytes)
    for copy in copies:
        copy.fill_(0)
    assert not block.any()
    for copy, tensor in zip(copy_into(block, tensors), tensors, strict=True):
        assert torch.equal(copy, tensor)


def test_a_snapshot_has_what_the_rank_writes_and_keeps_it():
    first, second = torch.ones(2, 3), torch.ones(4)
    shards = [
        RowShard("a", (2, 3), 0, 2, first, True),
        RowShard("b", (4,), 0, 4, torch.ones(4), False),
        RowShard("c", (4,), 0, 4, second, True),
    ]
    with ThreadPoolExecutor(1) as thread:
        copies, wait = HostCopies(thread).take({"model": shards, "exp_avg": shards[1:2]})
    first.fill_(2)
    second.fill_(2)
    wait()
    assert [shard.name for shard in copies["model"]] == ["a", "c"]
    assert all(shard.tensor.eq(1).all() for shard in copies["model"])
    assert copies["exp_avg"] == []


def test_a_save_returns_before_its_copies_are_complete_and_writes_them_after(monkeypatch, tmp_path):
    complete, written = threading.Event(), []

    def take(self, tensors):
        return {}, lambda: complete.wait(10)

    def save(*, tensors, process_group):
        written.append(complete.is_set())
        return tmp_path

    monkeypatch.setattr(HostCopies, "take", take)
    with BackgroundSaver(None, lambda path: None, pytest.fail) as saver:
        saver.save(save, {})
        assert written == []
        complete.set()
    assert written == [True]
