"""What happens around preprocessing: files gone or in the way, many values, no locks, wrong arguments."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backports import zstd

from megatron_tf.commands import preprocess_data, train_tokenizer
from megatron_tf.data import first_format, preprocess, published
from megatron_tf.data import part as part_module
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.preprocess import Settings
from megatron_tf.data.sources import LinesInput
from tests.support.data import write_data_set, write_tokenizer
from tests.support.paths import ROOT


def write_lines(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def run(prefix, inputs, *more):
    options = ["--input", *map(str, inputs), "--output-prefix", str(prefix), "--tokenizer-type", "NullTokenizer"]
    return preprocess_data.main([*options, "--append-eod", *more])


def texts(prefix):
    dataset = IndexedDataset(prefix)
    return [bytes(dataset.document(i)[:-1].tolist()).decode() for i in range(len(dataset))]


def command(arguments, limit=None):
    limited = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "-"] if limit else []
    return subprocess.run(
        [*limited, sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_shard_that_could_not_be_read_is_read_by_the_next_run(tmp_path, monkeypatch, capsys):
    shards = [write_lines(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i}"} for i in range(50)]) for n in "xyz"]
    opened = Path.open

    def refuse(path, *rest, **more):
        if path.name == "y.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *rest, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert run(tmp_path / "out", shards) == 1
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert "y.jsonl can't be read (Permission denied)" in error
    monkeypatch.undo()
    assert run(tmp_path / "out", shards) == 0
    assert texts(tmp_path / "out_text_document") == [f"{n}{i}" for n in "xyz" for i in range(50)]


def test_a_shard_without_a_document_is_an_error_beside_any_number_of_good_ones(tmp_path, capsys):
    good = write_lines(tmp_path / "good.jsonl", [{"text": "x"}] * 5000)
    (tmp_path / "bad.jsonl").write_text("<html>404</html>\n")
    assert run(tmp_path / "out", [good, tmp_path / "bad.jsonl"]) == 1
    assert "bad.jsonl: 1 lines, 16 bytes (1 x malformed JSON)" in capsys.readouterr().err
    assert not list(tmp_path.glob("out_*"))


def test_losses_are_reported_in_bytes_and_shards(tmp_path, capsys):
    content = "".join(json.dumps({"text": f"x{i}"}) + "\n" for i in range(4000)).encode()
    for name in "ab":
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstd.compress(content) + b"garbage")
    assert run(tmp_path / "out", [tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst"]) == 0
    assert "in 2 shards): damaged or truncated file" in capsys.readouterr().out
    bad = json.loads((tmp_path / "out.json").read_text())["bad_lines"]
    assert [(kind["count"], kind["shards"]) for kind in bad.values()] == [(2, 2)]
    assert len(texts(tmp_path / "out_text_document")) == 8000


@pytest.mark.parametrize("gone", [["bin"], ["idx"], ["documents.npz"], ["bin", "idx", "documents.npz", "json"]])
def test_data_sets_that_are_gone_are_made_again(tmp_path, capsys, gone):
    shard = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "de"}])
    assert run(tmp_path / "out", [shard]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    for kind in gone:
        (tmp_path / f"out_text_document.{kind}").unlink()
    capsys.readouterr()
    assert run(tmp_path / "out", [shard]) == 0
    assert ("complete already" in capsys.readouterr().out) == (gone == ["json"])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before


def test_data_sets_that_are_cut_or_others_are_not_called_complete(tmp_path, capsys):
    shard = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "de"}])
    assert run(tmp_path / "out", [shard]) == 0
    whole = (tmp_path / "out_text_document.bin").read_bytes()
    (tmp_path / "out_text_document.bin").write_bytes(whole[:-2])
    assert run(tmp_path / "out", [shard]) == 1
    assert "out_text_document.bin has 12 bytes" in capsys.readouterr().err
    write_data_set(tmp_path / "out_text_document", [[1, 2]])
    assert run(tmp_path / "out", [shard]) == 1
    assert "has 1 documents and 2 tokens, " in capsys.readouterr().err


def test_leftovers_of_a_killed_cleanup_are_removed(tmp_path, monkeypatch, capsys):
    shard = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}])

    def die(prefix):
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "remove_parts", die)
    assert run(tmp_path / "out", [shard]) == 130
    monkeypatch.undo()
    assert (tmp_path / "out.parts").exists()
    assert run(tmp_path / "out", [shard]) == 0
    assert "complete already" in capsys.readouterr().out
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.parametrize("content", ['[{"text": "a"}]', '{"text": "a"}\n{"text": "b"}\n', "", '{"a": 1}', "\xff", "5"])
def test_a_file_of_the_user_in_place_of_the_report_stays(tmp_path, capsys, content):
    shard = write_lines(tmp_path / "corpus.jsonl", [{"text": "abc"}])
    (tmp_path / "corpus.json").write_bytes(content.encode("latin-1"))
    assert run(tmp_path / "corpus", [shard]) == 1
    error = capsys.readouterr().err
    assert "corpus.json is not a report made by this tool" in error
    assert "remove" not in error
    assert (tmp_path / "corpus.json").read_bytes() == content.encode("latin-1")


@pytest.mark.parametrize("kind", ["bin", "idx", "json", "documents.npz"])
@pytest.mark.parametrize("more", [[], ["--split-by-meta", "lang"]])
def test_a_data_set_of_another_writer_is_not_overwritten(tmp_path, capsys, kind, more):
    shard = write_lines(tmp_path / "a.jsonl", [{"text": "abc", "meta": {"lang": "en"}}])
    other = tmp_path / f"pile_{'en_' if more else ''}text_document.{kind}"
    other.write_bytes(b"of another")
    for _ in range(2):
        assert run(tmp_path / "pile", [shard], *more) == 1
        assert f"{other} exists and was not written by this command" in capsys.readouterr().err
    assert other.read_bytes() == b"of another"
    other.unlink()
    assert run(tmp_path / "pile", [shard], *more) == 0


def test_a_folder_of_the_user_in_place_of_the_parts_stays(tmp_path, capsys):
    shard = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "thesis.tex").write_text("years of work")
    assert run(tmp_path / "out", [shard]) == 1
    assert "thesis.tex is not a file made by this tool" in capsys.readouterr().err
    assert (tmp_path / "out.parts" / "thesis.tex").read_text() == "years of work"


def test_values_that_look_alike_in_file_names_have_data_sets_of_their_own(tmp_path):
    values = ["C", "C++", "C#", "日本語", "中文", "한국어", "a_b", "a b"]
    shard = write_lines(tmp_path / "a.jsonl", [{"text": value, "meta": {"lang": value}} for value in values * 3])
    assert run(tmp_path / "out", [shard], "--split-by-meta", "lang") == 0
    found = [texts(str(path).removesuffix(".idx")) for path in sorted(tmp_path.glob("out_*.idx"))]
    assert sorted(found) == sorted([value] * 3 for value in values)


def test_documents_without_the_key_to_split_by_are_told_of(tmp_path, capsys):
    shard = write_lines(tmp_path / "a.jsonl", [{"text": "a", "source": "wiki"}, {"text": "b", "meta": {"lang": "en"}}])
    assert run(tmp_path / "out", [shard], "--split-by-meta", "source") == 0
    assert "warning: 2 of 2 documents have no meta.source" in capsys.readouterr().err
    assert run(tmp_path / "out2", [shard], "--split-by-meta", "lang") == 0
    assert "warning: 1 of 2 documents have no meta.lang" in capsys.readouterr().err


def test_more_values_than_files_may_be_open(tmp_path, monkeypatch):
    items = [{"text": f"t{i}", "meta": {"lang": f"set{i % 150}"}} for i in range(600)]
    shard = write_lines(tmp_path / "a.jsonl", items)
    arguments = ["--input", shard, "--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer"]
    done = command(["tools/preprocess_data.py", *arguments, "--append-eod", "--split-by-meta", "lang"], limit=256)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(part_module, "MAX_OPEN_OUTPUTS", 2)
    monkeypatch.setattr(preprocess, "COMMIT_BYTES", 100)
    monkeypatch.setattr("megatron_tf.data.documents.BATCH_BYTES", 1000)
    assert run(tmp_path / "few", [shard], "--split-by-meta", "lang") == 0
    for i in (0, 77, 149):
        expected = [f"t{j}" for j in range(i, 600, 150)]
        assert (
            texts(tmp_path / f"out_set{i}_text_document") == texts(tmp_path / f"few_set{i}_text_document") == expected
        )


def test_a_blend_of_more_data_sets_than_files_may_be_open(tmp_path):
    write_data_set(tmp_path / "a", [[1, 2]])
    code = (
        "import resource, sys\n"
        "from megatron_tf.data.indexed_dataset import DataError, IndexedDataset\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))\n"
        "try:\n"
        "    print(sum(len(d) for d in [IndexedDataset(sys.argv[1]) for _ in range(100)]))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    assert command(["-c", code, tmp_path / "a", 1024]).stdout == "100\n"
    assert (
        "(Too many open files): raise the limit of open files (ulimit -n)"
        in command(["-c", code, tmp_path / "a", 64]).stdout
    )


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_worked_on_after_a_warning(tmp_path, monkeypatch, caplog, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    shard = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    assert run(tmp_path / "out", [shard]) == 0
    assert [
        record.message.startswith(f"{tmp_path}/out.parts: its file system has no locks") for record in caplog.records
    ]
    assert texts(tmp_path / "out_text_document") == ["abc"]


def test_a_rank_builds_its_tokenizer_once(tmp_path):
    shards = [write_lines(tmp_path / f"{i}.jsonl", [{"text": "abc"}]) for i in range(5)]
    preprocess_data.build_once.cache_clear()
    arguments = ["--tokenizer-type", "NullTokenizer", "--workers", "1", "--input", *map(str, shards)]
    parsed = preprocess_data.parse_arguments([*arguments, "--output-prefix", str(tmp_path / "out")])
    settings = Settings({"type": "NullTokenizer"}, ("text",), append_eod=False, split_by_meta=None)
    published.parts_directory(parsed.output_prefix).mkdir()
    assert [
        preprocess_data.tokenize_alone(LinesInput(path), i, options=parsed, settings=settings)
        for i, path in enumerate(shards)
    ] == [1] * 5
    built = preprocess_data.build_once.cache_info()
    assert (built.misses, built.hits) == (1, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--log-interval", "0"], "--log-interval must be 1 or more"),
        (["--workers", "-1"], "--workers must be 1 or more"),
        (["--max-bad-lines", "5"], "a fraction from 0 to 1"),
        (["--max-bad-lines", "nan"], "a fraction from 0 to 1"),
        (["--max-bad-lines", "-1"], "a fraction from 0 to 1"),
        (["--json-keys", "text", "text"], "names 'text' twice"),
        (["--json-keys", "a/b"], "--json-keys 'a/b'"),
        (["--json-keys", ""], "--json-keys ''"),
        (["--json-keys", "k" * 300], "--json-keys 'kkk"),
    ],
)
def test_arguments_that_cannot_be_right_end_with_exit_code_2(tmp_path, capsys, arguments, message):
    shard = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "out", [shard], *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def train(prefix, *inputs, more=()):
    options = ["--vocab-size", "300", "--output-prefix", str(prefix), *more]
    return train_tokenizer.main(["--input", *map(str, inputs), *options])


def test_training_a_tokenizer_takes_patterns_and_tells_of_bad_lines(tmp_path, capfd):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"the {name} quick brown fox {i} jumps"} for i in range(60)])
    assert train(tmp_path / "t", tmp_path / "[ab].jsonl") == 0
    (tmp_path / "t.model").unlink()
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("{bad\n")
    assert train(tmp_path / "t", tmp_path / "a.jsonl", tmp_path / "b.jsonl") == 1
    error = capfd.readouterr().err
    assert "error: 1 of 121 lines are bad, more than --max-bad-lines 0.001 allows" in error
    assert "INTERNAL" not in error
    assert not list(tmp_path.glob("t.*"))
    assert train(tmp_path / "t", tmp_path / "?.jsonl", more=["--max-bad-lines", "0.1"]) == 0
    (tmp_path / "c.jsonl").write_text("<html>\n")
    assert train(tmp_path / "u", tmp_path / "a.jsonl", tmp_path / "c.jsonl") == 1
    assert "error: no document in" in capfd.readouterr().err
    assert not list(tmp_path.glob("u.*"))


def test_training_a_tokenizer_says_what_it_read_and_why_a_size_does_not_fit(tmp_path, capfd):
    texts = ["x" * 1500, *[f"the quick brown fox {i} jumps" for i in range(60)]]
    shard = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert train(tmp_path / "t", shard) == 0
    assert "t.model: 300 pieces, from 61 lines, of which 1 were cut at 1,000 characters" in capfd.readouterr().out
    assert train(tmp_path / "t", shard, more=["--max-sentences", "50"]) == 0
    assert "from 50 lines (--max-sentences), of which 1 were cut" in capfd.readouterr().out
    for size, reason in (
        ("3000", "Vocabulary size too high"),
        ("10", "Vocabulary size is smaller than required_chars"),
    ):
        assert train(tmp_path / "u", shard, more=["--vocab-size", size]) == 1
        error = capfd.readouterr().err
        assert error.startswith(f"error: --vocab-size {size}: {reason}")
        assert "character_coverage" not in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        train(tmp_path / "u", shard, more=["--max-sentences", "0"])


def as_version_0_1(prefix, **changes):
    """Let a report be as version 0.1 wrote it: another format, no end of documents, no bytes of bad lines."""
    path = Path(f"{prefix}.json")
    report = json.loads(path.read_text())
    for settings in (report["settings"], *report["inputs"], *report["data_sets"].values()):
        del settings["eod"]
    for settings in report["inputs"]:
        settings["format"] = 1
    del report["documents"], report["without_set"]
    path.write_text(json.dumps({**report, **changes}))


def test_data_sets_of_version_0_1_that_cannot_be_wrong_are_complete(tmp_path, capsys):
    inputs = [write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])]
    assert run(tmp_path / "o", inputs) == 0
    as_version_0_1(tmp_path / "o")
    before = Path(f"{tmp_path / 'o'}_text_document.bin").stat().st_mtime_ns
    assert run(tmp_path / "o", inputs) == 0
    assert "complete already" in capsys.readouterr().out
    assert Path(f"{tmp_path / 'o'}_text_document.bin").stat().st_mtime_ns == before
    Path(f"{tmp_path / 'o'}_text_document.idx").unlink()
    assert run(tmp_path / "o", inputs) == 0
    assert "making the datasets of" in capsys.readouterr().out
    assert texts(f"{tmp_path / 'o'}_text_document") == ["one", "", "two"]


def refused(prefix, inputs, capsys, *more):
    """The one line that ends a run over data of version 0.1."""
    assert run(prefix, inputs, *more) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {prefix}.json describes datasets made by version 0.1, ")
    assert line.endswith(": remove both and run the same command again, or choose another --output-prefix")
    return line


def test_data_sets_of_version_0_1_that_may_be_wrong_are_refused_with_the_reason(tmp_path, capsys):
    inputs, prefix = [write_lines(tmp_path / "a.jsonl", [{"text": "one", "meta": {"lang": "C"}}])], tmp_path / "o"
    assert run(prefix, inputs) == 0
    as_version_0_1(prefix, bad_lines={"malformed JSON": {"count": 1, "first": "a.jsonl:2"}})
    assert "counted unreadable files" in refused(prefix, inputs, capsys)
    as_other_end = tmp_path / "e"
    assert run(as_other_end, inputs) == 0
    as_version_0_1(as_other_end)
    data = Path(f"{as_other_end}_text_document.bin")
    data.write_bytes(data.read_bytes()[:-2] + b"\x07\x00")
    assert "whose documents end with id 7, and not with 256" in refused(as_other_end, inputs, capsys)
    split = ["--split-by-meta", "lang"]
    assert run(tmp_path / "s", inputs, *split) == 0
    as_version_0_1(tmp_path / "s")
    assert "different values of --split-by-meta" in refused(tmp_path / "s", inputs, capsys, *split)


@pytest.mark.parametrize("setting", ["truncation", "padding", "dropout", None])
def test_what_version_0_1_did_beyond_mapping_text_to_ids_is_looked_for(tmp_path, setting):
    path = write_tokenizer(tmp_path / "tokenizer.json", 20)
    content = json.loads(path.read_text())
    place = content["model"] if setting == "dropout" else content
    place |= {} if setting is None else {setting: 0.5 if setting == "dropout" else {"max_length": 8}}
    path.write_text(json.dumps(content))
    settings = {"tokenizer": {"type": "HFTokenizer"}, "split_by_meta": None}
    report = {"settings": settings, "bad_lines": {}}
    if setting is None:
        first_format.check_first_format("o", report, path)
        return
    with pytest.raises(DataError, match=r"applied the truncation, padding or dropout in .*tokenizer\.json"):
        first_format.check_first_format("o", report, path)


def test_other_settings_than_those_of_version_0_1_are_refused_as_ever(tmp_path, capsys):
    inputs = [write_lines(tmp_path / "a.jsonl", [{"text": "one"}])]
    assert run(tmp_path / "o", inputs) == 0
    as_version_0_1(tmp_path / "o")
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    assert run(tmp_path / "o", inputs) == 1
    assert "made from other inputs" in capsys.readouterr().err
