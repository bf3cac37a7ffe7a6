"""Data files that change under a run, caches that others write, and file systems that refuse locks, maps or writes."""

import errno
import itertools
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_tf.data import open_files, order, order_cache
from megatron_tf.data.gpt_dataset import GPTDataset
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.megatron_order import MegatronOrder
from megatron_tf.data.order import SampleOrder
from megatron_tf.data.order_cache import OrderArrays
from megatron_tf.data.packed_order import PackedOrder
from tests.support.data import loader_of, write_data_set

LENGTHS = np.full(50, 30, dtype=np.int32)


@pytest.fixture
def prefix(tmp_path):
    write_data_set(tmp_path / "d", [[i % 250 + 1] * 2_000 for i in range(50)], np.uint16)
    return tmp_path / "d"


def samples_of(prefix):
    indexed = IndexedDataset(prefix)
    order = SampleOrder(indexed.document_lengths, seq_length=64, seed=1, name="d", cache=prefix.parent / "cache")
    return GPTDataset(indexed, range(len(indexed)), order)


def order_in(cache, lengths=LENGTHS, **changes):
    return SampleOrder(lengths, **{"seq_length": 8, "seed": 1, "name": "d", "cache": cache, **changes})


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_truncated_while_it_is_read_is_named(prefix, suffix):
    with loader_of(samples_of(prefix), lambda _: 4, replica=0, replicas=1, consumed_samples=0) as loader:
        next(loader)
        os.truncate(f"{prefix}{suffix}", 100)
        with pytest.raises(DataError, match=rf"d\{suffix} has 100 bytes and had [0-9,]+ when it was opened"):
            list(itertools.islice(loader, 20))


@pytest.mark.parametrize("name", OrderArrays._fields)
@pytest.mark.parametrize("kind", [SampleOrder, PackedOrder, MegatronOrder])
def test_an_order_truncated_while_it_is_read_is_named_and_built_again_by_the_next_run(tmp_path, kind, name):
    more = {"samples": 100} if kind is MegatronOrder else {}

    def order_of_a_run():
        return kind(LENGTHS, seq_length=8, seed=1, name="d", cache=tmp_path, **more)

    running = order_of_a_run()
    expected = [int(part) for part in running.locate(3)[0].shuffle]
    (file,) = tmp_path.glob(f"order-*/{name}.npy")
    os.truncate(file, 100)
    with pytest.raises(DataError, match=rf"{name}\.npy has 100 bytes and had [0-9,]+ .*: .*; resume, which builds it"):
        running.locate(4)
    assert [int(part) for part in order_of_a_run().locate(3)[0].shuffle] == expected


@pytest.mark.parametrize("damage", [b"|O4", b"|S0", b"<u9", b"    "])
def test_an_order_whose_header_is_damaged_is_built_again(tmp_path, damage):
    expected = order_in(tmp_path).locate(3)[0].shuffle.tolist()
    (file,) = tmp_path.glob("order-*/shuffle.npy")
    content = file.read_bytes()
    at = content.index(b"<u4")
    file.write_bytes(content[:at] + damage[:3] + content[at + 3 :])
    assert order_in(tmp_path).locate(3)[0].shuffle.tolist() == expected


def test_what_is_left_of_a_truncated_file_is_still_read(prefix):
    dataset = IndexedDataset(prefix)
    os.truncate(f"{prefix}.bin", 3 * 4_000)
    assert dataset.document(2).tolist() == [3] * 2_000
    with pytest.raises(DataError, match=r"d\.bin has 12,000 bytes and had 200,000"):
        dataset.document(3)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_or_server_that_fails_is_reported_with_the_files_name(prefix, monkeypatch, code):
    dataset = IndexedDataset(prefix)
    monkeypatch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(DataError, match=rf"d\.bin can't be read \({os.strerror(code)}\)"):
        dataset.document(0)


def test_a_read_that_returns_less_than_asked_for_goes_on(prefix, monkeypatch):
    whole = IndexedDataset(prefix).document(7).tolist()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: pread(file, min(size, 999), start))
    assert IndexedDataset(prefix).document(7).tolist() == whole


def test_files_are_closed_with_their_dataset(prefix):
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    dataset = IndexedDataset(prefix)
    assert len(list(descriptors.iterdir())) > before
    del dataset
    assert len(list(descriptors.iterdir())) == before


def test_file_systems_without_maps(prefix, monkeypatch):
    expected = [samples_of(prefix)[i].tolist() for i in range(5)]

    def no_map(*_args, **_options):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr("mmap.mmap", no_map)
    assert [samples_of(prefix)[i].tolist() for i in range(5)] == expected


def refuse_to_write(monkeypatch, code):
    def refuse(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_directory_is_no_place_for_a_cache(tmp_path, monkeypatch, caplog, code):
    expected = order_in(tmp_path / "writable").locate(3)
    refuse_to_write(monkeypatch, code)
    for seed in (1, 2):
        found = order_in(tmp_path / f"read-only-{code}", seed=seed).locate(3)
        if seed == 1:
            assert found[1] == expected[1]
            assert all(map(np.array_equal, found[0], expected[0]))
    assert len(caplog.records) == 1
    assert "data.data_cache_path" in caplog.text


def test_a_cache_in_a_read_only_directory_is_used(tmp_path, monkeypatch):
    expected = order_in(tmp_path).locate(3)[1]
    refuse_to_write(monkeypatch, errno.EROFS)
    monkeypatch.setattr(SampleOrder, "_build", lambda *_: pytest.fail("it was there"))
    assert order_in(tmp_path).locate(3)[1] == expected


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_file_systems_that_refuse_locks(tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    expected = order_in(tmp_path / "with locks").locate(3)[1]
    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING):
        assert order_in(tmp_path / f"without-{code}").locate(3)[1] == expected
    assert "no locks" in caplog.text


def build_slowly(cache):
    """In a process of its own: start to write an order, and never finish."""
    save = np.save
    order_cache.np.save = lambda path, array: (save(path, array), (Path(cache) / "writing").touch(), time.sleep(600))
    order_in(Path(cache)).locate(3)


def test_a_process_that_is_killed_while_it_writes_a_cache_is_in_nobodys_way(tmp_path):
    expected = order_in(tmp_path / "other").locate(3)[1]
    cache = tmp_path / "cache"
    process = multiprocessing.get_context("spawn").Process(target=build_slowly, args=(str(cache),))
    process.start()
    deadline = time.monotonic() + 120
    while not (cache / "writing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    leftovers = list(cache.glob("order-*.tmp"))
    assert len(leftovers) == 1
    os.utime(leftovers[0], (0, 0))  # as if hours had passed
    assert order_in(cache).locate(3)[1] == expected
    assert not leftovers[0].exists()
    assert len(list(cache.glob("order-*/checksums.json"))) == 1


def test_what_another_process_may_still_be_writing_is_kept(tmp_path):
    order_in(tmp_path / "other").locate(3)
    name = next((tmp_path / "other").glob("order-*[!k]")).name
    young = tmp_path / f"{name}.abc.tmp"
    young.mkdir()
    order_in(tmp_path).locate(3)
    assert young.exists()


def test_a_cache_of_another_version_is_neither_used_nor_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "ORDER_VERSION", 1)
    order_in(tmp_path).locate(3)
    old = {path: path.read_bytes() for path in tmp_path.glob("order-*/*")}
    monkeypatch.undo()
    built = []
    build = SampleOrder._build
    monkeypatch.setattr(SampleOrder, "_build", lambda self, epoch: built.append(epoch) or build(self, epoch))
    order_in(tmp_path).locate(3)
    assert built
    assert {path: path.read_bytes() for path in old} == old


def test_a_cache_whose_files_have_another_form_is_rebuilt(tmp_path):
    expected = order_in(tmp_path).locate(3)[1]
    for path in tmp_path.glob("order-*/checksums.json"):
        path.write_text('{"version": 9}')
    assert order_in(tmp_path).locate(3)[1] == expected


def test_the_limit_of_open_files_is_raised(prefix, monkeypatch):
    raised = []
    monkeypatch.setattr(open_files, "allow_more_files", lambda: raised.append(1))
    opened = os.open

    def full(*arguments):
        if not raised:
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(*arguments)

    monkeypatch.setattr(os, "open", full)
    assert len(IndexedDataset(prefix)) == 50
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(DataError, match=r"d\.idx can't be opened .*ulimit -n"):
        IndexedDataset(prefix)
