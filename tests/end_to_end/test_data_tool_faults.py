"""Data sets that are links, floats, multimodal or fairseq's; samples that a run reads; caches that stay small."""

import errno
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_tf.commands import inspect_dataset, merge_datasets
from megatron_tf.config.load import load_config, to_dict
from megatron_tf.data import order, order_cache
from megatron_tf.data.build import build_dataset
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.order import SampleOrder
from tests.support.data import write_data_set
from tests.support.paths import ROOT
from tests.support.training import small_run


def merge(output, *prefixes):
    return merge_datasets.main(["--input", *map(str, prefixes), "--output-prefix", str(output)])


def test_merging_links_copies_what_is_behind_them(tmp_path):
    for name, ids in (("store/s", [7, 7, 7]), ("out/store/s", [9, 9, 9])):
        (tmp_path / name).parent.mkdir(parents=True)
        write_data_set(tmp_path / name, [ids])
    (tmp_path / "in").mkdir()
    for kind in ("bin", "idx"):
        (tmp_path / "in" / f"x.{kind}").symlink_to(f"../store/s.{kind}")
    assert merge(tmp_path / "out" / "sub" / "y", tmp_path / "in" / "x") == 0
    assert IndexedDataset(tmp_path / "out" / "sub" / "y").document(0).tolist() == [7, 7, 7]
    merged = tmp_path / "out" / "sub" / "y.bin"
    assert not merged.is_symlink()


def test_a_merged_data_set_shares_no_file_with_its_input(tmp_path):
    write_data_set(tmp_path / "a", [[1, 2]])
    assert merge(tmp_path / "m", tmp_path / "a") == 0
    np.array([5, 6], np.uint16).tofile(tmp_path / "a.bin")
    assert IndexedDataset(tmp_path / "m").document(0).tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["bin", "idx", "json", "documents.npz"])
def test_merging_overwrites_nothing_and_leaves_nothing_behind(tmp_path, capsys, monkeypatch, kind):
    write_data_set(tmp_path / "a", [[1, 2]])
    (tmp_path / f"m.{kind}").write_text("of another")
    assert merge(tmp_path / "m", tmp_path / "a") == 1
    assert f"m.{kind} exists" in capsys.readouterr().err
    assert (tmp_path / f"m.{kind}").read_text() == "of another"

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(merge_datasets, "write_index", fail)
    assert merge(tmp_path / "n", tmp_path / "a") == 1
    assert not list(tmp_path.glob("n*"))


def write_index(path, code, lengths, bounds, size, modes=b""):
    sizes = np.array(lengths, "<i4")
    offsets = (np.cumsum(sizes, dtype="<i8") - sizes) * size
    header = struct.pack("<9sQBQ", b"MMIDIDX\0\0", 1, code, len(lengths))
    if bounds is not None:
        header += struct.pack("<Q", len(bounds))
    tail = np.array(bounds or [], "<i8").tobytes()
    path.with_suffix(".idx").write_bytes(header + sizes.tobytes() + offsets.tobytes() + tail + modes)
    path.with_suffix(".bin").write_bytes(bytes(size * sum(lengths)))


@pytest.mark.parametrize(
    "code, size, bounds, modes, message",
    [
        (6, 8, [0, 1, 3], b"", "float64 values, not token ids"),
        (7, 4, [0, 1, 3], b"", "float32 values, not token ids"),
        (8, 2, [0, 1, 3], bytes([0, 1, 0]), "multimodal, sequence 1 has mode 1"),
        (8, 2, None, b"", "it is in fairseq's format, which has no document index"),
    ],
)
def test_data_that_is_not_of_text_tokens_is_refused_by_name(tmp_path, capsys, code, size, bounds, modes, message):
    write_index(tmp_path / "d", code, [10, 3, 7], bounds, size, modes)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "d")
    assert merge(tmp_path / "m", tmp_path / "d", tmp_path / "d") == 1
    assert message in capsys.readouterr().err
    (tmp_path / "d.idx").write_bytes(b"TNTIDX\0\0" + bytes(40))
    with pytest.raises(DataError, match="old format"):
        IndexedDataset(tmp_path / "d")


def shown(capsys, *arguments):
    assert inspect_dataset.main([*map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()[-1].split(": ")[1]


def test_inspection_shows_the_samples_of_the_run(tmp_path, capsys):
    generator = np.random.default_rng(1)
    for name in ("a", "b"):
        write_data_set(tmp_path / name, generator.integers(0, 250, (200, 9)).tolist())
    paths = {"a": [str(tmp_path / "a")], "blend": [f"0.3 {tmp_path / 'a'}", f"0.7 {tmp_path / 'b'}"]}
    for name, sampling in (("a", "counter"), ("blend", "counter"), ("blend", "megatron")):
        config = small_run(data={"data_path": paths[name], "order": sampling})
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
        dataset = build_dataset(load_config(tmp_path / "run.yaml", []))
        expected = [" ".join(map(str, dataset[i][:5].tolist())) for i in (0, 3)]
        options = ["--seq-length", config.training.seq_length, "--seed", config.training.seed]
        which = options if name == "a" else ["--config", tmp_path / "run.yaml"]
        found = [shown(capsys, tmp_path / "a", *which, "--samples", i) for i in (0, 3)]
        assert all(f.startswith(e) for f, e in zip(found, expected, strict=True))
        everything = shown(capsys, tmp_path / "a", *options, "--samples", 0, "--split", "1,0,0")
        assert not everything.startswith(expected[0])


def test_inspection_of_what_a_run_does_not_read_is_refused(tmp_path, capsys):
    for name in ("a", "b"):
        write_data_set(tmp_path / name, [[1, 2, 3]] * 99)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(small_run(data={"data_path": [str(tmp_path / "a")]}))))
    command = [str(tmp_path / "b"), "--config", str(tmp_path / "run.yaml"), "--samples", "0"]
    assert inspect_dataset.main(command) == 1
    assert f"does not read {tmp_path / 'b'}, but {tmp_path / 'a'}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inspect_dataset.main([*command, "--seed", "3"])
    assert "--seed is that of the run with --config" in capsys.readouterr().err


def test_inspection_shows_the_samples_of_a_run_that_version_0_1_began(tmp_path, capsys, monkeypatch):
    runs = ROOT / "tests" / "data" / "version_0_1"
    for name in ("data", "blended"):
        shutil.copytree(runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("blended/run.yaml"), ["--data.order=counter"])
    greedy, spaced = build_dataset(config, "greedy"), build_dataset(config)
    sample = next(i for i in range(100) if greedy[i].tolist() != spaced[i].tolist())
    found = shown(capsys, "data/first_text_document", "--config", "blended/run.yaml", "--samples", sample)
    assert found == " ".join(map(str, greedy[sample].tolist()))


def order_of(lengths, cache):
    return SampleOrder(lengths, seq_length=2, seed=1, name="x", cache=cache)


def test_epochs_of_a_small_data_set_share_files_and_stay_the_same(tmp_path, monkeypatch):
    lengths = np.array([3, 1, 4, 1, 5], np.int32)
    together = order_of(lengths, tmp_path / "together")
    monkeypatch.setattr(order, "_MAX_GROUP", 1)
    apart = order_of(lengths, tmp_path / "apart")
    for sample in range(0, 300 * together.samples_per_epoch, 5):
        (one, place), (other, other_place) = together.locate(sample), apart.locate(sample)
        assert place == other_place
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert sum(1 for _ in (tmp_path / "together").rglob("*")) == 14  # 300 epochs: two groups of 256
    assert sum(1 for _ in (tmp_path / "apart").rglob("*")) == 7 * 300


def test_without_locks_two_processes_may_build_the_same_order(tmp_path, monkeypatch):
    """The one that comes second finds the files of the first in its way."""
    lengths = np.array([3, 1, 4, 1, 5], np.int32)
    first = order_of(lengths, tmp_path).locate(0)[0]
    monkeypatch.setattr(order_cache.shutil, "rmtree", lambda path, ignore_errors=False: None)
    [directory] = [path for path in tmp_path.iterdir() if path.is_dir()]
    order_cache._write(directory, first)
    assert np.array_equal(order_of(lengths, tmp_path).locate(0)[0].shuffle, first.shuffle)
    assert json.loads((directory / "checksums.json").read_text())
    assert directory.stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0o777


def test_merging_sets_that_are_damaged_leaves_nothing_behind(tmp_path, capsys):
    write_data_set(tmp_path / "a", [[1, 2]])
    (tmp_path / "a.documents.npz").write_bytes(b"no archive")
    assert merge(tmp_path / "m", tmp_path / "a") == 1
    assert "a.documents.npz" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("m")] == []
