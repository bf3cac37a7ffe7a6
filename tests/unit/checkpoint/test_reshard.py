"""Resharding: the same values in files for other ranks, streamed."""

import itertools
import resource
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from megatron_tf.checkpoint import interface, lock
from megatron_tf.checkpoint.commit import complete_checkpoints
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.lock import LOCK, LockedError, RunLock
from megatron_tf.checkpoint.reshard import plan_files, reshard
from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.parallel.sharding import RowShard
from tests.support.toy import random_tensors, rank_shards, read_all, record, same, save, target

PAIRS = [((1, 1), (2, 1)), ((2, 1), (1, 3)), ((1, 3), (3, 2)), ((3, 2), (6, 3)), ((6, 3), (1, 1))]


def reshard_to(source, root, layout):
    """As the tool does."""
    reader = CheckpointReader(source, check_at_end=True)
    return reshard(reader, root, layout, check_source=reader.verify)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_there_and_back_is_byte_for_byte_the_same(tmp_path, pair):
    tensors = random_tensors()
    source = save(tmp_path / "source", tensors, (2, 2, 2))
    first = reshard_to(source, tmp_path / "a", target(*pair[0]))
    second = reshard_to(first, tmp_path / "b", target(*pair[1]))
    third = reshard_to(second, tmp_path / "c", target(*pair[0]))
    assert same(read_all(second), tensors)
    assert CheckpointReader(second).record == record()
    files = [{path.name: path.read_bytes() for path in directory.iterdir()} for directory in (first, third)]
    assert files[0] == files[1]


def test_blocks_do_not_show(tmp_path, monkeypatch):
    tensors = random_tensors()
    source = save(tmp_path / "source", tensors, (5, 1, 1))
    monkeypatch.setattr(interface, "BLOCK_BYTES", 7 * 24)  # seven rows
    assert same(read_all(reshard_to(source, tmp_path / "target", target(2, 2))), tensors)


@pytest.mark.parametrize("layout", [(2, 1), (2, 3), (6, 2)], ids=str)
def test_each_rank_finds_its_rows_in_its_own_file(tmp_path, layout):
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = random_tensors()
    path = reshard_to(save(tmp_path / "a", tensors), tmp_path / "b", target(*layout))
    for stage, rank in itertools.product(range(layout[1]), range(layout[0])):
        for group, shards in rank_shards(tensors, (*layout, 1), (stage, rank, 0)).items():
            held = load_file(path / f"{group}-pp{stage:02d}-tp{rank:02d}-dp00.safetensors")
            wanted = {shard.name: shard.tensor for shard in shards if shard.is_writer}
            assert held.keys() == wanted.keys()
            assert all(torch.equal(held[name], tensor) for name, tensor in wanted.items())


def test_rows_that_do_not_divide_are_refused(tmp_path):
    source = save(tmp_path / "a", random_tensors())
    with pytest.raises(CheckpointError, match=r"embedding\.weight has 24 rows, which 5 tensor-parallel ranks cannot"):
        reshard_to(source, tmp_path / "b", target(5, 1))
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_does_not_replace_itself(tmp_path):
    path = save(tmp_path, random_tensors())
    with pytest.raises(CheckpointError, match="would replace itself: choose another directory"):
        reshard_to(path, tmp_path, target(2, 1))
    CheckpointReader(path).verify()


def test_a_damaged_source_leaves_nothing_behind(tmp_path):
    path = save(tmp_path / "a", random_tensors())
    file = path / "exp_avg-pp00-tp00-dp00.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"exp_avg-pp00-tp00-dp00\.safetensors is damaged"):
        reshard_to(path, tmp_path / "b", target(2, 1))
    assert list((tmp_path / "b").iterdir()) == []


def test_the_plan_is_what_is_written(tmp_path):
    source = save(tmp_path / "a", random_tensors())
    plans = list(plan_files(CheckpointReader(source), target(2, 3)))
    path = reshard_to(source, tmp_path / "b", target(2, 3))
    assert {plan.name for plan in plans} == {file.name for file in path.glob("*.safetensors")}


def test_memory_is_a_few_blocks_whatever_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr(interface, "BLOCK_BYTES", 1 << 16)
    whole = torch.randn(1 << 15, 64)  # 8 MiB
    shard = RowShard("embedding.weight", tuple(whole.shape), 0, len(whole), whole, True)
    source = save_checkpoint(tmp_path / "a", 1, tensors={"model": [shard]}, record=record(1), writer_label="all")
    largest, original = 0, CheckpointReader.read_rows

    def counted(self, *args, **options):
        nonlocal largest
        rows = original(self, *args, **options)
        largest = max(largest, rows.untyped_storage().nbytes())
        return rows

    monkeypatch.setattr(CheckpointReader, "read_rows", counted)
    tracemalloc.start()
    path = reshard_to(source, tmp_path / "b", target(2, 1))
    _, peak = tracemalloc.get_traced_memory()  # what Python holds: tensors' storage is counted above
    tracemalloc.stop()
    assert largest == 1 << 16
    assert peak < 4 << 20  # hashing the source takes blocks of 1 MiB
    monkeypatch.undo()
    assert torch.equal(CheckpointReader(path).read_rows("model", "embedding.weight", start=0, stop=len(whole)), whole)


def test_more_files_than_a_process_may_open_are_read_and_hashed(tmp_path):
    tensors = random_tensors()
    source = save(tmp_path / "source", tensors, (6, 2, 2))
    reader = CheckpointReader(source, check_at_end=True)
    few = len(list(Path("/proc/self/fd").iterdir())) + 8
    assert len(reader.manifest.files) > 2 * 8
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        path = reshard(reader, tmp_path / "target", target(1, 1), check_source=reader.verify)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert same(read_all(path), tensors)


def test_the_directory_of_a_living_run_is_left_alone(tmp_path):
    source = save(tmp_path / "source", random_tensors())
    saving = tmp_path / "run" / ".step_00000007.tmp"
    saving.mkdir(parents=True)
    reader = CheckpointReader(source)
    with (
        RunLock(tmp_path / "run", pytest.fail),
        pytest.raises(LockedError, match=r"--save: another run is writing to .*/run"),
    ):
        reshard(reader, tmp_path / "run", target(1, 1), allow_existing=True)
    assert saving.exists()
    reshard(reader, tmp_path / "run", target(1, 1), allow_existing=True)
    assert not saving.exists()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_directory_that_another_run_took_over_gets_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    source = save(tmp_path / "source", random_tensors())
    reader = CheckpointReader(source)

    def stolen():
        (tmp_path / "run" / LOCK).unlink()
        time.sleep(0.5)  # the thread of the lock looks every 20 ms, twice

    with pytest.raises(CheckpointError, match="--save: another run took over"):
        reshard(reader, tmp_path / "run", target(1, 1), check_source=stolen)
    assert complete_checkpoints(tmp_path / "run") == []
