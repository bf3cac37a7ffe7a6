"""tools/preprocess_data.py against a plain twin, and what it makes of bad input, kills, full disks and many ranks."""

import contextlib
import gzip
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from megatron_tf.commands import preprocess_data
from megatron_tf.commands.registry import COMMANDS
from megatron_tf.data import documents, preprocess
from tests.support.full_disk import FullDisk
from tests.support.preprocessing import (
    EOD,
    make_documents,
    mpi,
    options,
    read,
    read_sets,
    run,
    sets_of,
    start,
    to_lines,
    twin,
)


@pytest.fixture
def shards(tmp_path):
    """Five inputs of all kinds, and their documents."""
    items = [list(make_documents(40, seed)) for seed in range(5)]
    lines = [to_lines(part) for part in items]
    (tmp_path / "a.jsonl").write_bytes(lines[0])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(lines[2]))
    half = len(lines[3]) // 2
    (tmp_path / "d.jsonl.zst").write_bytes(zstd.compress(lines[3][:half]) + zstd.compress(lines[3][half:]))
    (tmp_path / "e.jsonl").write_bytes(lines[4].replace(b"\n", b"\r\n\n")[:-3])  # blank lines, no line end at the end
    return sorted(tmp_path.glob("?.jsonl*")), [item for part in items for item in part]


def test_all_kinds_of_files_and_several_keys(shards, tmp_path):
    inputs, items = shards
    assert run([inputs[0], tmp_path / "[b-e].jsonl*"], tmp_path / "out", "--json-keys", "text", "title") == 0
    for key in ("text", "title"):
        assert read(tmp_path / f"out_{key}_document") == twin(items, key)
        assert read_sets(tmp_path / f"out_{key}_document", 200) == sets_of(items, key)
    report = json.loads((tmp_path / "out.json").read_text())
    counts = report["data_sets"][str(tmp_path / "out_text_document")]
    assert counts["documents"] == 200
    assert counts["tokens"] == sum(map(len, twin(items)))
    assert counts["text_bytes"] == sum(len(item["text"].encode()) for item in items)
    assert sum(part["documents"] for part in counts["pile_sets"].values()) == 200
    assert not (tmp_path / "out.parts").exists()


def test_a_data_set_for_each_value_of_meta(shards, tmp_path):
    inputs, items = shards
    assert run(inputs, tmp_path / "out", "--split-by-meta", "pile_set_name") == 0
    for name, stem in (("Books", "Books"), ("Pile-CC", "Pile-CC"), ("A/B c", "A_B_c")):
        chosen = [item for item in items if item["meta"]["pile_set_name"] == name]
        assert read(tmp_path / f"out_{stem}_text_document") == twin(chosen)
        assert read_sets(tmp_path / f"out_{stem}_text_document", len(chosen)) == sets_of(chosen)


def test_run_again_it_does_nothing_and_refuses_other_settings(shards, tmp_path, capsys):
    inputs, _ = shards
    assert run(inputs, tmp_path / "out") == 0
    before = (tmp_path / "out_text_document.bin").stat().st_mtime_ns
    assert run(inputs, tmp_path / "out") == 0
    assert "complete already" in capsys.readouterr().out
    assert (tmp_path / "out_text_document.bin").stat().st_mtime_ns == before
    assert preprocess_data.main(options(inputs, tmp_path / "out")) == 1
    assert "other settings" in capsys.readouterr().err


BAD = [
    (b"{broken\n", "malformed JSON"),
    (b'{"other": 1}\n', "no key 'text'"),
    (b'{"text": 5}\n', "'text' is not a text"),
    (b"[1]\n", "not a JSON object"),
    (b'{"text": "\xff"}\n', "invalid UTF-8"),
    (b'{"text": "\\ud800"}\n', "'text' has a lone surrogate"),
    (b"[" * 100_000 + b"\n", "malformed JSON"),
    (b'{"text": "' + b"y" * 5_000 + b'"}\n', "longer than 0 MiB"),
    (b'{"text": "cut o', "truncated last line"),
]
ODD = [b'\xef\xbb\xbf{"text": "bom"}\n', b'{"text": "\\u0000"}\n', b'{"text": "n", "x": NaN, "y": 1e999}\n', b"  \n"]


def test_bad_lines_are_counted_shown_and_limited(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 4_000)
    path, good = tmp_path / "bad.jsonl", b'{"text": "abc"}\n'
    lines = [line for line, _ in BAD if len(line) < 10_000]
    path.write_bytes(good + b"".join(ODD) + b"".join(lines))
    assert run([path], tmp_path / "out") == 1
    assert f"{len(lines)} of {4 + len(lines)} lines are bad" in capsys.readouterr().err
    assert not list(tmp_path.glob("out_*"))
    assert run([path], tmp_path / "out", "--max-bad-lines", "0.9") == 0
    assert read(tmp_path / "out_text_document") == twin([{"text": text} for text in ("abc", "bom", "\0", "n")])
    report = json.loads((tmp_path / "out.json").read_text())["bad_lines"]
    expected = [kind for line, kind in BAD if len(line) < 10_000]
    assert list(report) == expected
    assert [bad["first"] for bad in report.values()] == [f"{path}:{n}" for n in range(6, 6 + len(expected))]


def compress(suffix, items):
    """Compressed lines in parts of 100, each of which ends with a checksum."""
    parts = [to_lines(items[start : start + 100]) for start in range(0, len(items), 100)]
    if suffix == "gz":
        return b"".join(map(gzip.compress, parts))
    options = {zstd.CompressionParameter.checksum_flag: True}
    return b"".join(zstd.compress(part, options=options) for part in parts)


@pytest.mark.parametrize("damage", ["cut", "flip"])
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_compression_is_counted_and_what_came_before_is_kept(tmp_path, suffix, damage):
    generator, whole = random.Random(0), 1_400
    items = [{"text": generator.randbytes(2_000).hex()} for _ in range(2_000)]
    data = bytearray(compress(suffix, items))
    place = len(data) * 72 // 100  # within the part after `whole` documents
    if damage == "cut":
        data = data[:place]
    else:
        data[place] ^= 0xFF
        data[place + 1] ^= 0xFF
    path = tmp_path / f"damaged.jsonl.{suffix}"
    path.write_bytes(data)
    assert run([path], tmp_path / "out", "--max-bad-lines", "0.1") == 0
    kept = read(tmp_path / "out_text_document")
    assert 1_000 < len(kept) < 2_000
    # a flip can change documents of its part: the checksum at the end of the part tells
    sound = len(kept) if damage == "cut" else min(len(kept), whole)
    assert kept[:sound] == twin(items[:sound])
    bad = json.loads((tmp_path / "out.json").read_text())["bad_lines"]
    assert any("damaged or truncated" in kind for kind in bad)


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (b"", [], "no document in"),
        (b"x", ["--input", "nowhere.jsonl"], "no such file"),
        (b"x", ["--tokenizer-type", "NullTokenzer"], "did you mean NullTokenizer?"),
        (b"x", ["--tokenizer-type", "HFTokenizer"], "HFTokenizer needs a tokenizer file"),
    ],
)
def test_mistakes_end_with_one_clear_error(tmp_path, capsys, content, arguments, message):
    (tmp_path / "in.jsonl").write_bytes(content)
    assert run([tmp_path / "in.jsonl"], tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out_*"))


def test_stopped_anywhere_it_resumes_to_the_same_bytes(shards, tmp_path, monkeypatch, capsys):
    """The disk is full after each number of appended batches in turn; committed work is not done again."""
    inputs, items = shards
    disk = FullDisk(monkeypatch, batches=3)
    disk.room = 10**6
    assert run(inputs, tmp_path / "whole") == 0
    assert disk.attempts(lambda: run(inputs, tmp_path / "pieces")) > 5
    assert "make room and run the same command again" in capsys.readouterr().err
    for kind in ("bin", "idx", "documents.npz"):
        whole, pieces = (tmp_path / f"{stem}_text_document.{kind}" for stem in ("whole", "pieces"))
        assert whole.read_bytes() == pieces.read_bytes()
    assert read(tmp_path / "pieces_text_document") == twin(items)


def test_a_changed_input_is_tokenized_again(shards, tmp_path, monkeypatch):
    inputs, items = shards
    monkeypatch.setattr(preprocess, "assemble", lambda *_, **__: {"data_sets": {}, "bad_lines": {}})
    monkeypatch.setattr(preprocess_data, "assemble", lambda *_, **__: {"data_sets": {}, "bad_lines": {}})
    assert run(inputs, tmp_path / "out") == 0
    monkeypatch.undo()
    changed = list(make_documents(7, seed=9))
    inputs[0].write_bytes(to_lines(changed))
    assert run(inputs, tmp_path / "out") == 0
    assert read(tmp_path / "out_text_document") == twin(changed + items[40:])


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tmp_path):
    path, items = tmp_path / "big.jsonl", [{"text": "word " * 20_000}] * 400
    path.write_bytes(to_lines(items))
    command = [sys.executable, "tools/preprocess_data.py", *options([path], tmp_path / "out", "--append-eod")]
    kills = 0
    for delay in (0.2, 0.4, 0.6, 0.8):
        process = start(command)
        time.sleep(delay)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    done = start(command)
    assert done.wait(60) == 0, done.communicate()[1]
    assert kills
    data = np.fromfile(tmp_path / "out_text_document.bin", dtype=np.uint16).reshape(400, -1)
    assert (data == [*b"word " * 20_000, EOD]).all()


def test_importing_the_trainer_is_no_part_of_tokenizing():
    module = "megatron_tf.commands.preprocess_data"
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert start([sys.executable, "-c", code]).wait(60) == 0


def test_no_command_imports_torch_for_its_help():
    modules = ", ".join(f"megatron_tf.commands.{entry.module}" for entry in COMMANDS.values())
    assert start([sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"]).wait(60) == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_mpi_give_the_same_bytes(shards, tmp_path, ranks):
    inputs, items = shards
    process = mpi(ranks, options(inputs, tmp_path / "out", "--append-eod", "--workers", "1"))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "(5 of 5 inputs)" in out
    assert read(tmp_path / "out_text_document") == twin(items)


def test_an_input_that_fails_on_a_rank_is_named_and_the_others_are_kept(shards, tmp_path):
    inputs, _ = shards
    unknown = inputs[2].rename(tmp_path / "c.jsonl.bad")
    broken = [*inputs[:2], unknown, *inputs[3:]]
    process = mpi(3, options(broken, tmp_path / "out", "--append-eod", "--workers", "1"))
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "1 of 5 inputs failed; the others are kept" in error
    assert "c.jsonl.bad: inputs end in" in error
    assert len(list((tmp_path / "out.parts").glob("*.json"))) == 4


def rank_processes(argument):
    """Ids of Python processes that were given an argument with this text in it."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().decode()
            if command.startswith(sys.executable) and argument in command:
                yield int(process.name)


def test_a_killed_rank_ends_the_job_and_loses_nothing(tmp_path):
    inputs = [tmp_path / f"{i}.jsonl" for i in range(4)]
    items = [{"text": "word " * 20_000}] * 150
    for path in inputs:
        path.write_bytes(to_lines(items))
    arguments = options(inputs, tmp_path / "out", "--append-eod", "--workers", "1")
    process = mpi(3, arguments)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.parts").glob("*.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    victims = sorted(rank_processes(str(tmp_path)))
    os.kill(victims[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert mpi(3, arguments).wait(120) == 0
    assert read(tmp_path / "out_text_document") == twin(items * 4)
