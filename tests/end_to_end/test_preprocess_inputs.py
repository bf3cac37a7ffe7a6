"""preprocess-data on Parquet, Arrow, compressed lines and standard input, against the same text as plain lines."""

import bz2
import json
import lzma
import subprocess
import sys

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_tf.commands import train_tokenizer
from megatron_tf.data import columns
from megatron_tf.data.indexed_dataset import IndexedDataset
from tests.support.commands import ENVIRONMENT
from tests.support.full_disk import FullDisk
from tests.support.paths import ROOT
from tests.support.preprocessing import make_documents, mpi, options, read, read_sets, run, sets_of, to_lines, twin

ITEMS = list(make_documents(600, seed=4))


def write_inputs(folder, items=ITEMS, rows=20):
    """The same items in order: Parquet, Arrow's two formats, xz, bzip2, and plain lines."""
    parts = [items[start : start + len(items) // 6] for start in range(0, len(items), len(items) // 6)]
    tables = [pa.Table.from_pylist(part) for part in parts[:3]]
    pq.write_table(tables[0], folder / "a.parquet", row_group_size=rows)
    for name, new, table in (("b", pa.ipc.new_file, tables[1]), ("c", pa.ipc.new_stream, tables[2])):
        with new(str(folder / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table, rows)
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(to_lines(parts[3])))
    (folder / "e.jsonl.bz2").write_bytes(bz2.compress(to_lines(parts[4])))
    (folder / "f.jsonl").write_bytes(to_lines(parts[5]))
    return sorted(folder.glob("?.*"))


def piped(arguments, content, **more):
    """Run the command with bytes, or a file object, as its standard input."""
    given = {"input": content} if isinstance(content, bytes) else {"stdin": content}
    command = [sys.executable, "-m", "megatron_tf", "preprocess-data", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False, **given, **more)


def stream_options(prefix, *more):
    return options(["-"], prefix, "--append-eod", "--workers", "1", *more)


def one_error(done):
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1, line
    return line


def test_inputs_of_every_format_give_the_bytes_of_the_same_lines(tmp_path):
    (tmp_path / "plain.jsonl").write_bytes(to_lines(ITEMS))
    assert run(write_inputs(tmp_path), tmp_path / "out", "--json-keys", "text", "title") == 0
    assert run([tmp_path / "plain.jsonl"], tmp_path / "lines", "--json-keys", "text", "title") == 0
    for key in ("text", "title"):
        assert read(tmp_path / f"out_{key}_document") == twin(ITEMS, key)
        assert read_sets(tmp_path / f"out_{key}_document", 600) == sets_of(ITEMS, key)
        for kind in ("bin", "idx"):
            names = (f"{prefix}_{key}_document.{kind}" for prefix in ("out", "lines"))
            assert len({(tmp_path / name).read_bytes() for name in names}) == 1
    counts = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("out", "lines")]
    assert counts[0]["documents"] == counts[1]["documents"] == 1200 // 2
    assert len(counts[0]["inputs"]) == 6


def test_tables_stopped_anywhere_resume_to_the_same_bytes(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch, batches=8)  # two batches, of three sets each, and so a commit
    monkeypatch.setattr(columns, "SOURCE_BYTES", 20_000)
    inputs = write_inputs(tmp_path)
    assert disk.attempts(lambda: run(inputs, tmp_path / "out", "--split-by-meta", "pile_set_name")) > 10
    for name, stem in (("Books", "Books"), ("Pile-CC", "Pile-CC"), ("A/B c", "A_B_c")):
        chosen = [item for item in ITEMS if item["meta"]["pile_set_name"] == name]
        assert read(tmp_path / f"out_{stem}_text_document") == twin(chosen)


def test_the_groups_of_a_file_are_distributed_over_ranks_with_the_same_bytes(tmp_path):
    table = pa.Table.from_pylist(ITEMS).append_column("filler", [["x" * 400] * 600])
    (tmp_path / "sitecustomize.py").write_text("from megatron_tf.data import columns\ncolumns.SOURCE_BYTES = 1\n")
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=150)
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table, 300)
    arguments = options([tmp_path / "a.parquet", tmp_path / "b.arrow"], tmp_path / "out", "--append-eod")
    process = mpi(3, [*arguments, "--workers", "1"], python_path=tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "a.parquet, row groups 0 to 0: " in out
    assert "b.arrow, from record batch 1: 300 documents (" in out
    assert "(6 of 6 inputs)" in out
    assert read(tmp_path / "out_text_document") == twin(ITEMS * 2)


def test_bad_rows_of_a_divided_file_count_as_one_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(columns, "SOURCE_BYTES", 1)
    texts = [None if i % 100 == 99 and i > 200 else f"text {i}" for i in range(1000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=200)
    assert run([tmp_path / "a.parquet"], tmp_path / "out") == 1
    assert "8 of 1000 lines are bad, more than --max-bad-lines 0.001 allows" in capsys.readouterr().err
    assert run([tmp_path / "a.parquet"], tmp_path / "out", "--max-bad-lines", "0.01") == 0
    assert "skipped 8 bad lines (0 bytes in 1 shards): 'text' is not a text, the first at " in capsys.readouterr().out
    bad = json.loads((tmp_path / "out.json").read_text())["bad_lines"]["'text' is not a text"]
    assert (bad["count"], bad["shards"], bad["first"]) == (8, 1, f"{tmp_path / 'a.parquet'}:300")
    assert len(read(tmp_path / "out_text_document")) == 992


def test_a_group_without_a_document_is_counted_and_a_file_without_one_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(columns, "SOURCE_BYTES", 1)
    text = pa.array([f"text {i}" for i in range(2000)] + [None], pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", row_group_size=2000)
    assert run([tmp_path / "a.parquet"], tmp_path / "out") == 0
    assert len(read(tmp_path / "out_text_document")) == 2000
    pq.write_table(pa.table({"text": pa.array([None] * 4, pa.string())}), tmp_path / "b.parquet", row_group_size=2)
    assert run([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "two") == 1
    assert "b.parquet: 4 lines, 0 bytes (4 x 'text' is not a text)" in capsys.readouterr().err


def test_a_row_of_100_mb_is_one_document(tmp_path):
    size = 100 << 20
    pq.write_table(pa.table({"text": ["small", "y" * size, "end"]}), tmp_path / "a.parquet", compression="zstd")
    assert run([tmp_path / "a.parquet"], tmp_path / "out") == 0
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert dataset.document_lengths.tolist() == [6, size + 1, 4]
    assert bytes(dataset.document(2)[:3].tolist()) == b"end"


def test_keys_with_dots_lead_through_objects_unless_there_is_such_a_key(tmp_path):
    items = [
        {"meta": {"text": "nested", "more": {"text": "deep"}}},
        {"meta.text": "whole name", "meta": {"text": "hidden", "more": {"text": "two"}}},
    ]
    (tmp_path / "a.jsonl").write_bytes(to_lines(items))
    assert run([tmp_path / "a.jsonl"], tmp_path / "out", "--json-keys", "meta.text", "meta.more.text") == 0
    assert read(tmp_path / "out_meta.text_document") == twin([{"text": "nested"}, {"text": "whole name"}])
    assert read(tmp_path / "out_meta.more.text_document") == twin([{"text": "deep"}, {"text": "two"}])


def test_objects_that_do_not_lead_to_text_are_bad_lines(tmp_path):
    values = [{"meta": {"text": 5}}, {"meta": "text"}, {"meta": {}}, {"meta": None}, {"text": "x"}]
    (tmp_path / "a.jsonl").write_bytes(to_lines([{"meta": {"text": "good"}}, *values]))
    assert run([tmp_path / "a.jsonl"], tmp_path / "out", "--json-keys", "meta.text", "--max-bad-lines", "0.9") == 0
    bad = json.loads((tmp_path / "out.json").read_text())["bad_lines"]
    assert {kind: each["count"] for kind, each in bad.items()} == {
        "'meta.text' is not a text": 1,
        "no key 'meta.text'": 4,
    }
    assert read(tmp_path / "out_meta.text_document") == twin([{"text": "good"}])


def test_standard_input_gives_the_bytes_of_a_file(tmp_path):
    inputs = write_inputs(tmp_path)
    arguments = stream_options(tmp_path / "out")
    arguments[arguments.index("-") : arguments.index("-") + 1] = [str(inputs[0]), "-", str(inputs[1])]
    content = to_lines(ITEMS[:50]) + b"{bad}\n" + to_lines(ITEMS[50:70])[:-1]
    assert b"1 of 271 lines are bad, more than --max-bad-lines 0.001 allows" in piped(arguments, content).stderr
    done = piped([*arguments, "--max-bad-lines", "0.01"], content)
    assert done.returncode == 0, done.stderr
    assert b"the first at standard input:51" in done.stdout
    assert read(tmp_path / "out_text_document") == twin([*ITEMS[:100], *ITEMS[:70], *ITEMS[100:200]])


def test_standard_input_that_ended_early_resumes_only_with_the_same_lines(tmp_path, monkeypatch):
    patch = "from megatron_tf.data import documents, preprocess\n"
    patch += "preprocess.COMMIT_BYTES, documents.BATCH_BYTES = 3_000, 2_000\n"
    (tmp_path / "sitecustomize.py").write_text(patch + DIE_IN_THE_FOURTH_BATCH)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    content, arguments = to_lines(ITEMS), stream_options(tmp_path / "out")
    assert piped(arguments, content, env=environment).returncode == 9
    journal = json.loads((tmp_path / "out.parts" / "00000.json").read_text())
    assert 0 < journal["lines"] < 600
    (tmp_path / "sitecustomize.py").write_text(patch)
    other = content.replace(b"growth", b"Growth", 1)
    assert "differs from what an earlier command read for this prefix (its first" in one_error(piped(arguments, other))
    assert "it ends after 1 lines" in one_error(piped(arguments, to_lines(ITEMS[:1])))
    assert piped(arguments, content, env=environment).returncode == 0
    assert read(tmp_path / "out_text_document") == twin(ITEMS)
    assert b"complete already" in piped(arguments, content).stdout
    assert "(its first 600 lines are others)" in one_error(piped(arguments, content[:-9] + b"Z" + content[-8:]))
    assert "(it has more than 600 lines)" in one_error(piped(arguments, content * 2))


DIE_IN_THE_FOURTH_BATCH = """
import os
append, left = preprocess.Part.append, [3]
def die(part, *batch, mask):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    append(part, *batch, mask=mask)
preprocess.Part.append = die
"""


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no document in standard input: it is empty"),
        (lzma.compress(b'{"text": "a"}\n'), "standard input is xz, not JSON lines: decompress it before the pipe"),
        (b"<html>\n", "no document in standard input: 1 lines, 6 bytes (1 x malformed JSON)"),
        (b'{"text": "cut o', "no document in standard input: 1 lines, 15 bytes (1 x truncated last line)"),
    ],
)
def test_standard_input_without_documents_ends_with_one_line(tmp_path, content, message):
    assert message in one_error(piped(stream_options(tmp_path / "out"), content))


def test_standard_input_that_is_closed_or_named_twice_ends_with_one_line(tmp_path, capsys):
    command = [sys.executable, "-m", "megatron_tf", "preprocess-data", *stream_options(tmp_path / "out")]
    closed = ["bash", "-c", 'exec "$@" <&-', "-", *map(str, command)]
    done = subprocess.run(closed, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert "standard input is closed: pipe JSON lines" in one_error(done)
    assert run(["-", "-"], tmp_path / "out") == 1
    assert "names -, which is standard input, twice" in capsys.readouterr().err


def test_standard_input_and_ranks_are_refused_together(tmp_path):
    process = mpi(2, stream_options(tmp_path / "out"), stdin=subprocess.DEVNULL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: --input - has to be read by one process: start it without mpiexec" in error


def test_a_tokenizer_is_trained_on_tables(tmp_path):
    table = pa.table({"body": [f"the quick brown fox {i} jumps" for i in range(120)]})
    pq.write_table(table, tmp_path / "a.parquet")
    arguments = ["--input", str(tmp_path / "*.parquet"), "--vocab-size", "300", "--output-prefix", str(tmp_path / "t")]
    assert train_tokenizer.main([*arguments, "--json-key", "body"]) == 0
    assert (tmp_path / "t.model").exists()
    assert train_tokenizer.main(arguments) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hf-dataset", "x", "--hf-split", "train"], "give either --input or --hf-dataset"),
        (["--hf-split", "train"], "--hf-dataset and --hf-split go together"),
        (["--hf-config", "en"], "--hf-config needs --hf-dataset"),
    ],
)
def test_options_of_a_dataset_that_do_not_fit_end_with_exit_code_2(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run(["a.jsonl"], tmp_path / "out", *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    for name in ("parquet_files", "columns", "hub_datasets"):
        monkeypatch.delitem(sys.modules, f"megatron_tf.data.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run([tmp_path / "a.parquet"], tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "a.parquet needs pyarrow, which is not installed: pip install '.[arrow]' in a clone of megatron_tf" in error
