"""Data sets merged, looked into, and their index files built ahead."""

import json

import numpy as np
import pytest
import yaml

from megatron_tf.commands import build_index, inspect_dataset, merge_datasets
from megatron_tf.config.load import load_config, to_dict
from megatron_tf.data import order_cache
from megatron_tf.data.build import build_dataset
from megatron_tf.data.document_sets import ROW, DocumentSets, read_document_sets, sets_path
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset, write_index
from tests.support.data import write_data_set
from tests.support.training import small_run

REPORT = {"tokenizer": {"type": "NullTokenizer", "vocab_size": 257, "sha256": None}}


@pytest.fixture
def prefixes(tmp_path):
    """Two data sets; in the second, documents are of 2, 0 and 1 sequences."""
    write_data_set(tmp_path / "a", [[1, 2, 3], [], [4]])
    (tmp_path / "b.bin").write_bytes(np.array([5, 6, 7, 8, 9], np.uint16).tobytes())
    blocks = [(np.array([2, 1, 2], np.int32), np.array([2, 0, 1]))]
    write_index(tmp_path / "b.idx", np.dtype(np.uint16), lambda: blocks)
    for name, documents, tokens in (("a", 3, 4), ("b", 3, 5)):
        counts = {"documents": documents, "tokens": tokens, "text_bytes": 10}
        (tmp_path / f"{name}.json").write_text(json.dumps({**REPORT, **counts, "pile_sets": {"Books": counts}}))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_merged_documents_are_those_of_the_parts(prefixes, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_datasets, "INDEX_BLOCK", 2)
    assert merge_datasets.main(["--input", *prefixes, "--output-prefix", str(tmp_path / "m")]) == 0
    merged = IndexedDataset(tmp_path / "m")
    assert [merged.document(i).tolist() for i in range(6)] == [[1, 2, 3], [], [4], [5, 6, 7], [], [8, 9]]
    assert merged.lengths.tolist() == [3, 1, 2, 1, 2]
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["tokens"] == report["pile_sets"]["Books"]["tokens"] == 9


def test_merged_documents_keep_their_sets(prefixes, tmp_path):
    names = [["Books", "Wiki"], ["Code", "Wiki", "Books"]]
    for prefix, of_part, sets in zip(prefixes, names, ([0, 1, 0], [2, 0, 1]), strict=True):
        rows = np.array([(place, 10 + place) for place in sets], ROW)
        DocumentSets(of_part, rows).write(sets_path(prefix))
    assert merge_datasets.main(["--input", *prefixes, "--output-prefix", str(tmp_path / "m")]) == 0
    merged = read_document_sets(tmp_path / "m", 6)
    found = [(merged.names[place], size) for place, size in merged.rows.tolist()]
    assert found == [("Books", 10), ("Wiki", 11), ("Books", 10), ("Books", 12), ("Code", 10), ("Wiki", 11)]
    sets_path(prefixes[0]).unlink()
    assert merge_datasets.main(["--input", *prefixes, "--output-prefix", str(tmp_path / "n")]) == 0
    assert read_document_sets(tmp_path / "n", 6) is None


def test_sets_that_are_not_of_the_documents_are_refused(tmp_path):
    path = sets_path(tmp_path / "d")
    for count, places in ((3, [0, 1]), (2, [0, 2])):
        DocumentSets(["Books", "Wiki"], np.array([(place, 1) for place in places], ROW)).write(path)
        with pytest.raises(DataError, match=rf"d\.documents\.npz is not of these {count} documents"):
            read_document_sets(tmp_path / "d", count)
    for content in (b"", b"PK\x03\x04", path.read_bytes()[:-40]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"d\.documents\.npz is damaged"):
            read_document_sets(tmp_path / "d", 2)


def test_merging_refuses_what_does_not_fit(prefixes, tmp_path, capsys):
    write_data_set(tmp_path / "wide", [[1]], np.int32)
    arguments = ["--output-prefix", str(tmp_path / "m"), "--input", prefixes[0]]
    assert merge_datasets.main([*arguments, str(tmp_path / "wide")]) == 1
    assert "different types: int32, uint16" in capsys.readouterr().err
    (tmp_path / "b.json").write_text(json.dumps({"tokenizer": {"type": "other"}}))
    assert merge_datasets.main([*arguments, prefixes[1]]) == 1
    assert "different tokenizers" in capsys.readouterr().err
    assert not list(tmp_path.glob("m*"))


def test_inspection_shows_documents_samples_and_counts(tmp_path, capsys):
    write_data_set(tmp_path / "a", [list(b"growth"), list(b"tokens"), [256]])
    options = ["--documents", "1", "--samples", "0", "--seq-length", "4", "--tokenizer-type", "NullTokenizer"]
    assert inspect_dataset.main([str(tmp_path / "a"), *options]) == 0
    out = capsys.readouterr().out
    for expected in (
        "3 documents, 13 tokens",
        "ids from 101 to 256",
        "document 1, 6 tokens: 116 111",
        "\ntokens\n",
        "of 3 an",
    ):
        assert expected in out


def test_inspection_refuses_ids_beyond_the_vocabulary(tmp_path, capsys):
    write_data_set(tmp_path / "a", [[1, 300]])
    assert inspect_dataset.main([str(tmp_path / "a"), "--tokenizer-type", "NullTokenizer"]) == 1
    assert "outside the vocabulary of 257" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["counter", "megatron"])
def test_a_run_finds_every_index_it_needs_built(tmp_path, monkeypatch, order):
    for name in ("a", "b"):
        write_data_set(tmp_path / name, [list(range(50)) for _ in range(20)])
    config = to_dict(
        small_run(
            data={"data_path": [f"0.3 {tmp_path / 'a'}", f"0.7 {tmp_path / 'b'}"], "order": order, "split": "80,20,0"},
            training={"train_iters": 40},
        )
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    assert build_index.main([str(path)]) == 0

    def fail(directory, arrays):
        pytest.fail(f"{directory} was not built ahead")

    monkeypatch.setattr(order_cache, "_write", fail)
    run = load_config(path, [])
    dataset = build_dataset(run)
    for sample in range(run.training.train_iters * run.training.global_batch_size):
        assert len(dataset[sample]) == run.training.seq_length + 1
