"""preprocess-data on Hugging Face datasets: local directories, offline."""

import json
import os

import pytest

pytest.importorskip("datasets", reason="datasets is not installed")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_tf.commands import preprocess_data
from megatron_tf.data import documents, hub_datasets
from tests.support.full_disk import FullDisk
from tests.support.preprocessing import make_documents, mpi, read, read_sets, sets_of, to_lines, twin

ITEMS = list(make_documents(300, seed=6))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset of three Parquet files for training, and one for a test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    hub_datasets._load.cache_clear()
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        table = pa.Table.from_pylist(ITEMS[100 * number : 100 * number + 100])
        pq.write_table(table, tmp_path / "corpus" / f"train-{number:05d}-of-00003.parquet", row_group_size=30)
    pq.write_table(pa.Table.from_pylist(ITEMS[:5]), tmp_path / "corpus" / "test-00000-of-00001.parquet")
    return tmp_path / "corpus"


def arguments(folder, prefix, *more, split="train"):
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--append-eod", "--workers", "1"]
    return ["--hf-dataset", str(folder), "--hf-split", split, "--output-prefix", str(prefix), *tokenizer, *more]


def run(folder, prefix, *more, split="train"):
    return preprocess_data.main(arguments(folder, prefix, *more, split=split))


def test_a_split_becomes_a_dataset_with_its_sets(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "--json-keys", "text", "title") == 0
    for key in ("text", "title"):
        assert read(tmp_path / f"out_{key}_document") == twin(ITEMS, key)
        assert read_sets(tmp_path / f"out_{key}_document", 300) == sets_of(ITEMS, key)
    assert run(folder, tmp_path / "test", split="test") == 0
    assert read(tmp_path / "test_text_document") == twin(ITEMS[:5])
    capsys.readouterr()
    assert run(folder, tmp_path / "out", "--json-keys", "text", "title") == 0
    assert "complete already" in capsys.readouterr().out


def test_a_changed_file_of_a_dataset_is_another_input(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out") == 0
    pq.write_table(pa.Table.from_pylist(ITEMS[:7]), folder / "train-00001-of-00003.parquet")
    hub_datasets._load.cache_clear()
    assert run(folder, tmp_path / "out") == 1
    assert "made from other inputs" in capsys.readouterr().err


def test_stopped_anywhere_it_resumes_to_the_same_bytes(folder, tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch, batches=4)
    assert disk.attempts(lambda: run(folder, tmp_path / "out")) > 5
    assert read(tmp_path / "out_text_document") == twin(ITEMS)


def test_its_shards_are_distributed_over_ranks_with_the_same_bytes(folder, tmp_path):
    process = mpi(3, arguments(folder, tmp_path / "out"))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert f"{folder}, split train, shard 2: 100 documents (" in out
    assert "(3 of 3 inputs)" in out
    assert read(tmp_path / "out_text_document") == twin(ITEMS)


def test_bad_rows_are_counted_and_lines_may_have_other_keys(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 4_000)
    rows = [{"meta": {"text": f"nested {i}"}} for i in range(6)]
    rows[2]["meta"]["text"], rows[4]["meta"]["text"] = None, "y" * 5_000
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_bytes(to_lines(rows))
    assert run(tmp_path / "lines", tmp_path / "out", "--json-keys", "meta.text", "--max-bad-lines", "0.4") == 0
    assert read(tmp_path / "out_meta.text_document") == twin([{"text": f"nested {i}"} for i in (0, 1, 3, 5)])
    bad = json.loads((tmp_path / "out.json").read_text())["bad_lines"]
    assert {kind: each["count"] for kind, each in bad.items()} == {
        "'meta.text' is not a text": 1,
        "longer than 0 MiB": 1,
    }
    assert bad["longer than 0 MiB"]["first"] == f"{tmp_path / 'lines'}, split train:5"


def refused(folder, prefix, capsys, *more, split="train"):
    assert run(folder, prefix, *more, split=split) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    return line


def test_what_the_library_cannot_open_or_read_ends_with_one_line(folder, tmp_path, capsys):
    assert "Bad split: nope. Available splits: " in refused(folder, tmp_path / "a", capsys, split="nope")
    assert f"--hf-dataset {tmp_path / 'gone'}, split train: " in refused(tmp_path / "gone", tmp_path / "b", capsys)
    assert f"no document in {folder}, split test: 5 lines" in refused(
        folder, tmp_path / "c", capsys, "--json-keys", "body", split="test"
    )
    last = folder / "train-00002-of-00003.parquet"
    os.truncate(last, last.stat().st_size // 2)
    hub_datasets._load.cache_clear()
    assert f"--hf-dataset {folder}, split train: ArrowInvalid: " in refused(folder, tmp_path / "d", capsys)


def test_what_save_to_disk_wrote_is_read_as_arrow_files(folder, tmp_path, capsys):
    saved = datasets.Dataset.from_list(ITEMS[:20])
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))
    for name, pattern in (("saved", "saved/*.arrow"), ("splits", "splits/train/*.arrow")):
        assert f"read its files with --input '{tmp_path / pattern}'" in refused(tmp_path / name, tmp_path / "a", capsys)
        options = [
            "--tokenizer-type",
            "NullTokenizer",
            "--append-eod",
            "--output-prefix",
            str(tmp_path / f"{name}_out"),
        ]
        assert preprocess_data.main(["--input", str(tmp_path / pattern), *options]) == 0
        assert read(tmp_path / f"{name}_out_text_document") == twin(ITEMS[:20])
