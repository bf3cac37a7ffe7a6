"""A checkpoint is complete or absent, whenever the process that saves it dies."""

import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tf import files
from megatron_tf.checkpoint import commit
from megatron_tf.checkpoint.commit import complete_checkpoints, prepare_directory, prune, publish, step_of
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.parallel.sharding import RowShard
from tests.support.ranks import RankPool
from tests.support.toy import random_tensors, read_all, record, same, save, write


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


def die_before(monkeypatch, moment):
    """Let the process "die" just before its `moment`-th change of the disk after now."""
    changes, rmtree = 0, shutil.rmtree

    def counted(original):
        def change(*args, **kwargs):
            nonlocal changes
            changes += 1
            if changes > moment:
                if original is rmtree:  # the one change that is many: some files are gone
                    next(Path(args[0]).glob("*.safetensors")).unlink()
                raise Killed
            return original(*args, **kwargs)

        return change

    writes = [(commit, "write_durably"), (files, "write_durably")]
    for owner, name in [(Path, "rename"), (Path, "replace"), (shutil, "rmtree"), *writes]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("step", [100, 200], ids=["replacing", "new"])
def test_some_complete_checkpoint_is_there_at_every_moment(tmp_path, monkeypatch, step):
    old, new = random_tensors(1), random_tensors(2)
    outcomes = []
    for moment in range(20):
        root = tmp_path / str(moment)
        save(root, old, (2, 1, 1), step=100)
        written = write(root, new, (1, 2, 1), step)
        with monkeypatch.context() as patch:
            die_before(patch, moment)
            try:
                publish(root, step, record=record(step), written=written)
                outcomes.append("done")
            except Killed:
                CheckpointReader(root).verify()
                found = read_all(root)
                outcomes.append("new" if same(found, new) else "old")
                assert outcomes[-1] == "new" or same(found, old)
        save(root, new, step=300)  # continues as if nothing had happened
        assert {path.name[0] for path in root.iterdir()} == {"s", "l"}
        assert same(read_all(root), new)
        assert 100 in [int(path.name[5:]) for path in complete_checkpoints(root)]
        if outcomes[-1] == "done":
            break
    assert {"old", "done"} <= set(outcomes)
    assert outcomes == sorted(outcomes, key=["old", "new", "done"].index)  # once new, never old again


CHILD = """
import sys, time
from pathlib import Path
from tests.support.toy import random_tensors, save, write
root = Path(sys.argv[1])
save(root, random_tensors(1))
write(root, random_tensors(2), step=200)
print("written", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_kill_minus_nine_during_a_save_leaves_the_one_before(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (tmp_path / ".step_00000200.tmp").exists()
    assert CheckpointReader(tmp_path).step == 100
    assert same(read_all(tmp_path), random_tensors(1))
    save(tmp_path, random_tensors(3), step=200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100", "step_00000200"]


def test_old_checkpoints_are_pruned_but_never_the_newest(tmp_path):
    tensors = random_tensors()
    for step in (100, 200, 300):
        save(tmp_path, tensors, step=step)
    prune(tmp_path, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000200", "step_00000300"]
    save(tmp_path, tensors, step=50)  # a run that went back
    prune(tmp_path, 1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000050", "step_00000300"]
    assert CheckpointReader(tmp_path).step == 50


def test_every_nth_checkpoint_stays(tmp_path):
    for step in range(10, 80, 10):
        save(tmp_path, random_tensors(), step=step)
        prune(tmp_path, 2, keep_every=30)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [30, 60, 70]


def test_steps_sort_as_numbers(tmp_path):
    for step in (5, 99_999_999, 100_000_000):
        save(tmp_path, random_tensors(), step=step)
    assert [int(path.name[5:]) for path in complete_checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 100 << 20))
    with pytest.raises(CheckpointError, match=r"needs 50,000,000 bytes and the disk has 104,857,600 free: make room"):
        prepare_directory(tmp_path, 1, 50_000_000)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_end_at(size):
    """Writing a file beyond `size` fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [0, 500, 9000, 16_000])
def test_a_disk_that_fills_leaves_the_one_before(tmp_path, capsys, room):
    """Nothing but the error is left of the save, and of the tool's work."""
    save(tmp_path / "run", random_tensors(1))
    tensors = random_tensors(2)["model"]
    shards = [RowShard(name, tuple(rows.shape), 0, len(rows), rows, True) for name, rows in tensors.items()]
    with files_end_at(room), pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "run", 200, tensors={"model": shards}, record=record(200), writer_label="all")
    assert ".step_00000200.tmp/model-all.safetensors: File too large after" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "step_00000100"]
    assert same(read_all(tmp_path / "run"), random_tensors(1))
    with files_end_at(room):
        assert reshard_checkpoint.main(["--load", str(tmp_path / "run"), "--save", str(tmp_path / "other")]) == 1
    file = "/model-pp00-tp00-dp00.safetensors: File too large after" if room else "/other/.lock.*: File too large"
    assert re.search(file, capsys.readouterr().err)
    assert list((tmp_path / "other").iterdir()) == []


def test_a_failed_save_cleans_up_and_says_why(tmp_path):
    shard = RowShard("w", (2, 2), 0, 2, torch.ones(2, 2), True)
    with pytest.raises(CheckpointError, match=r"saving failed on rank 0: .*not JSON serializable"):
        save_checkpoint(
            tmp_path,
            1,
            tensors={"model": [shard]},
            record=replace(record(1), config={"model": object()}),
            writer_label="all",
        )
    assert list(tmp_path.iterdir()) == []


def save_on_rank(mesh, root, fails):
    """Save two rows from each rank; on the rank that `fails`, writing is impossible."""
    rank = mesh.rank("dp")
    rows = torch.full((2, 3), float(rank))
    if rank == fails:
        rows = rows.to_sparse()
    shard = RowShard("w", (4, 3), 2 * rank, 2 * rank + 2, rows, True)
    start = time.monotonic()
    try:
        return str(
            save_checkpoint(
                root,
                10,
                tensors={"model": [shard]},
                record=record(10),
                writer_label=f"dp{rank:02d}",
                process_group=mesh.world,
            )
        )
    except CheckpointError as error:
        assert time.monotonic() - start < 10  # no waiting for a collective that the failed rank never joins
        return str(error)


@pytest.mark.slow
def test_real_ranks_save_together_and_fail_together(tmp_path):
    pool = RankPool(2)
    try:
        first, second = pool.run(save_on_rank, 1, 1, 2, tmp_path / "good", None)
        failed = pool.run(save_on_rank, 1, 1, 2, tmp_path / "bad", 1)
    finally:
        pool.close()
    assert first == second
    assert CheckpointReader(Path(first)).read_rows("model", "w", start=0, stop=4)[:, 0].tolist() == [0, 0, 1, 1]
    assert failed[0] == failed[1]
    assert failed[0].startswith("saving failed on rank 1")
    assert list((tmp_path / "bad").iterdir()) == []
