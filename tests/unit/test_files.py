"""Files are on the disk before anything relies on them, and a wait for a lock is bounded and announced."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_tf import files
from megatron_tf.checkpoint import destination
from megatron_tf.commands import merge_datasets, preprocess_data, train_tokenizer
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.order_cache import open_or_build
from megatron_tf.files import concatenate, locked, replace_durably, write_json


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


@pytest.fixture
def changes(monkeypatch):
    """What happens to the disk: ("sync", path), ("rename", old, new), ("remove", folder), in order."""
    seen, fsync, replace, rmtree = [], os.fsync, Path.replace, shutil.rmtree

    def note_sync(descriptor):
        seen.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def note_rename(path, target):
        seen.append(("rename", str(path), str(target)))
        return replace(path, target)

    def note_removal(path, **options):
        seen.append(("remove", str(path)))
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    monkeypatch.setattr(shutil, "rmtree", note_removal)
    return seen


def test_a_file_is_replaced_once_its_content_is_on_the_disk(tmp_path, changes):
    write_json(tmp_path / "a.json", {"b": 1})
    new, path = str(tmp_path / "a.json.tmp"), str(tmp_path / "a.json")
    assert changes == [("sync", new), ("rename", new, path), ("sync", str(tmp_path))]
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}


def test_a_tokenizer_gets_its_name_once_it_is_on_the_disk(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(train_tokenizer, "fit", lambda lines, file, vocab_size: file.write(b"model"))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one"}\n')
    options = ["--vocab-size", "300", "--output-prefix", str(tmp_path / "t")]
    assert train_tokenizer.main(["--input", str(text), *options]) == 0
    new, path = str(tmp_path / "t.model.tmp"), str(tmp_path / "t.model")
    assert changes == [("sync", new), ("rename", new, path), ("sync", str(tmp_path))]


@pytest.mark.parametrize("owner, name", [(os, "fsync"), (Path, "replace")])
def test_a_crash_leaves_the_file_that_was_there(tmp_path, monkeypatch, owner, name):
    replace_durably(tmp_path / "a", "old")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            replace_durably(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    replace_durably(tmp_path / "a", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_files_are_put_together_and_one_file_is_linked_where_that_is_allowed(tmp_path, changes):
    sources = [tmp_path / name for name in "ab"]
    for source in sources:
        source.write_text(source.name)
    target = tmp_path / "c"
    concatenate(sources, target)
    assert target.read_text() == "ab"
    concatenate(sources[:1], target)
    assert (target.read_text(), target.samefile(sources[0])) == ("a", False)
    assert changes == [("sync", str(target))] * 2
    concatenate(sources[:1], target, may_link=True)
    assert target.samefile(sources[0])


def shards(tmp_path, count):
    for number in range(count):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": "abc"}) + "\n")
    return [str(tmp_path / f"{number}.jsonl") for number in range(count)]


def is_durable(changes, path):
    """Whether a file was synced, then renamed to `path`, and then its folder was synced."""
    renamed = [place for place, change in enumerate(changes) if change[0] == "rename" and change[2] == str(path)]
    return (
        len(renamed) == 1
        and ("sync", changes[renamed[0]][1]) in changes[: renamed[0]]
        and ("sync", str(path.parent)) in changes[renamed[0] :]
    )


def test_parts_are_removed_once_the_data_set_made_of_them_is_on_the_disk(tmp_path, changes):
    options = ["--tokenizer-type", "NullTokenizer", "--output-prefix", str(tmp_path / "out"), "--workers", "1"]
    assert preprocess_data.main(["--input", *shards(tmp_path, 2), *options]) == 0
    removed = changes.index(("remove", str(tmp_path / "out.parts")))
    data_set = tmp_path / "out_text_document"
    for name in ("bin", "idx", "json", "documents.npz"):
        assert is_durable(changes[:removed], Path(f"{data_set}.{name}")), name
    assert is_durable(changes[:removed], tmp_path / "out.json")


def test_what_a_crash_left_among_the_parts_is_in_nobodys_way(tmp_path):
    (tmp_path / "out.parts").mkdir()
    for name in ("00000.json.tmp", "00000.tmp", "data_sets.tmp"):  # the second is of version 0.1
        (tmp_path / "out.parts" / name).write_text("{")
    options = ["--tokenizer-type", "NullTokenizer", "--output-prefix", str(tmp_path / "out"), "--workers", "1"]
    assert preprocess_data.main(["--input", *shards(tmp_path, 1), *options]) == 0


def test_merged_data_sets_are_on_the_disk(tmp_path, changes):
    options = ["--tokenizer-type", "NullTokenizer", "--workers", "1"]
    for name in "ab":
        arguments = ["--input", *shards(tmp_path, 1), "--output-prefix", str(tmp_path / name)]
        assert preprocess_data.main([*arguments, *options]) == 0
    changes.clear()
    prefixes = [str(tmp_path / f"{name}_text_document") for name in "ab"]
    assert merge_datasets.main(["--input", *prefixes, "--output-prefix", str(tmp_path / "c")]) == 0
    for name in ("bin", "idx", "json"):
        assert is_durable(changes, tmp_path / f"c.{name}"), name


def test_a_conversion_takes_its_place_once_all_of_it_is_on_the_disk(tmp_path, changes):
    with destination.new_directory(tmp_path / "out", 0) as directory:
        (directory / "inner").mkdir()
        written = [directory / "a", directory / "inner" / "b"]
        for path in written:
            path.write_text("x")
    [place] = [place for place, change in enumerate(changes) if change[0] == "rename"]
    for path in (*written, directory, directory / "inner"):
        assert ("sync", str(path)) in changes[:place]
    assert ("sync", str(tmp_path)) in changes[place:]


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A file that somebody else has locked."""
    monkeypatch.setattr(files, "_SILENT_SECONDS", 0.1)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield tmp_path / "lock"


def test_a_wait_is_announced_once_and_ends(held, caplog):
    with (
        pytest.raises(DataError, match="lock: it is busy"),
        locked(held, timeout=1.2, busy="it is busy", error=DataError),
    ):
        pass
    assert caplog.text.count(f"{held}: another process holds this lock: waiting up to 1 s for it") == 1
    assert held.exists()


def test_nothing_is_said_where_no_wait_is_wanted_or_needed(held, caplog):
    with pytest.raises(DataError, match="it is busy"), locked(held, timeout=0, busy="it is busy", error=DataError):
        pass
    with locked(held.with_name("other"), timeout=9, busy="it is busy", error=DataError):
        pass
    assert caplog.text == ""


def test_a_file_in_place_of_the_cache_of_orders_is_named_with_its_key(tmp_path):
    (tmp_path / "file").write_text("")
    message = rf"^data.data_cache_path: {tmp_path}/file can't be made \(File exists\): choose another directory$"
    with pytest.raises(DataError, match=message):
        open_or_build(tmp_path / "file", ("any",), lambda: pytest.fail("built"))
