"""A resume on other data than the run has read ends with one line, unless the configuration allows the change."""

import itertools
import shutil

import numpy as np
import pytest

from megatron_tf import pretrain
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.data.indexed_dataset import IndexedDataset
from tests.support.commands import make_run
from tests.support.damage import change_metadata
from tests.support.data import write_data_set
from tests.support.runs import derive_run

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two steps on the sets a and b, with the set c next to them."""
    folder = make_run(tmp_path_factory.mktemp("changed"), training={"train_iters": 2})
    for name in "abc":
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(folder / f"data_text_document{suffix}", folder / f"{name}{suffix}")
    data = {"data_path": blend(folder, "0.75 a", "0.25 b"), "order": "counter"}
    base = derive_run(folder, "base", data=data)
    assert pretrain.main([str(base)]) == 0
    return folder


def blend(folder, *entries):
    return [f"{weight} {folder / name}" for weight, name in map(str.split, entries)]


def resume(folder, capsys, *options, load="base"):
    """(exit code, the line that lists changes or "", lines of errors) of a run that starts from a checkpoint."""
    capsys.readouterr()
    options = [f"--checkpoint.load={folder / load}", f"--checkpoint.save={folder}/{next(NUMBERS)}", *options]
    code = pretrain.main([str(folder / "base.yaml"), *options])
    said = capsys.readouterr()
    return code, "".join(line for line in said.out.splitlines() if "changed since" in line), said.err.splitlines()


def check_refused_unless_allowed(folder, capsys, *options, words):
    code, _, errors = resume(folder, capsys, *options)
    assert (code, len(errors)) == (1, 1)
    assert all(word in errors[0] for word in words)
    code, line, errors = resume(folder, capsys, *options, "--checkpoint.allow_changes=[data]")
    assert (code, errors) == (0, [])
    assert all(word in line for word in words)
    assert "tokens of the current epoch may be read again or left out" in line


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("training.seq_length", 8, ["16 -> 8"]),
        ("training.seed", 5, ["-> 5"]),
        ("data.split", "50,50,0", ["'80,20,0' -> '50,50,0'"]),
        ("data.order", "megatron", ["'counter' -> 'megatron'"]),
        ("data.data_path", ("0.5 a", "0.5 b"), ["0.75 ", "-> ['0.5 "]),
        ("data.data_path", ("0.75 a",), ["/b'] -> ["]),
        ("data.data_path", ("0.75 a", "0.25 c"), ["/b'] -> [", "/c']"]),
        ("data.data_path", ("0.75 a", "0.25 b", "1 c"), ["/b'] -> [", "/c']"]),
        ("data.data_path", ("0.25 b", "0.75 a"), ["/b'] -> [", "/a']"]),
    ],
    ids=["seq_length", "seed", "split", "order", "weights", "dropped set", "other set", "added set", "order of sets"],
)
def test_each_difference_of_the_data_ends_a_resume_unless_it_is_allowed(folder, capsys, key, value, words):
    value = blend(folder, *value) if isinstance(value, tuple) else value
    check_refused_unless_allowed(folder, capsys, f"--{key}={value}", words=[key, *words])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda documents: [*documents, documents[0]], "40 -> 41 documents"),
        (lambda documents: [*documents[:-1], documents[-1][:-1]], "bytes of tokens"),
        (lambda documents: [documents[0] ^ 1, *documents[1:]], "other tokens: hash "),
        (
            lambda documents: [np.append(documents[0], documents[1][0]), documents[1][1:], *documents[2:]],
            "the same tokens",
        ),
    ],
    ids=["an appended document", "a shorter document", "another token", "another boundary"],
)
def test_a_set_whose_files_changed_ends_a_resume_unless_it_is_allowed(folder, capsys, change, words):
    files = {path: path.read_bytes() for path in (folder / "b.bin", folder / "b.idx")}
    try:
        data = IndexedDataset(folder / "b")
        write_data_set(folder / "b", change([data.document(number).copy() for number in range(len(data))]))
        check_refused_unless_allowed(folder, capsys, words=["data.content: the files of b changed", words])
    finally:
        for path, content in files.items():
            path.write_bytes(content)
    assert resume(folder, capsys) == (0, "", [])


def test_several_differences_are_all_named_in_one_line(folder, capsys):
    options = ["--training.seed=5", "--data.split=50,50,0", "--training.train_iters=3"]
    code, _, (error,) = resume(folder, capsys, *options)
    assert code == 1
    assert all(key in error for key in ("training.seed", "data.split", "training.train_iters 2 -> 3"))
    assert "checkpoint.allow_changes: [data, training.train_iters]" in error
    code, _, (error,) = resume(folder, capsys, *options, "--checkpoint.allow_changes=[data]")
    assert code == 1
    assert "checkpoint.allow_changes: [training.train_iters]" in error
    assert "training.seed" not in error


def test_the_batch_size_is_free_unless_megatrons_order_depends_on_it(folder, capsys):
    code, line, _ = resume(folder, capsys, "--training.global_batch_size=4")
    assert (code, "global_batch_size 8 -> 4" in line, "read again" in line) == (0, True, False)
    options = ["--data.order=megatron", "--checkpoint.allow_changes=[data.order]", "--training.global_batch_size=4"]
    code, _, (error,) = resume(folder, capsys, *options)
    assert (code, "checkpoint.allow_changes: [training.global_batch_size]" in error) == (1, True)
    assert resume(folder, capsys, *options, "--checkpoint.allow_changes=[data]")[0] == 0


def forget_identities(metadata):
    metadata["run"]["data"] = None


def forget_counts(metadata):
    for identity in metadata["run"]["data"]:
        del identity["documents"]


def forget_order(metadata):
    del metadata["config"]["data"]["order"]


@pytest.mark.parametrize("change", [forget_identities, forget_counts, forget_order])
def test_checkpoints_of_older_versions_resume_on_the_same_data(folder, capsys, change):
    source = older(folder, change)
    assert resume(folder, capsys, load=source) == (0, "", [])


def test_a_checkpoint_that_names_no_order_was_trained_in_the_default_order(folder, capsys):
    code, _, (error,) = resume(folder, capsys, "--data.order=megatron", load=older(folder, forget_order))
    assert (code, "data.order 'counter' -> 'megatron'" in error) == (1, True)


def test_content_without_a_count_of_documents_is_still_compared(folder, capsys):
    source = older(folder, forget_counts)
    files = {path: path.read_bytes() for path in (folder / "b.bin", folder / "b.idx")}
    try:
        write_data_set(folder / "b", [[1] * 40] * 40)
        code, _, (error,) = resume(folder, capsys, load=source)
    finally:
        for path, content in files.items():
            path.write_bytes(content)
    assert (code, "data.content: the files of b changed" in error) == (1, True)
    assert "bytes of tokens" in error


def older(folder, change):
    """The name of a copy of the checkpoint as another version would have written it."""
    name = f"older-{next(NUMBERS)}"
    shutil.copytree(folder / "base", folder / name, symlinks=True)
    change_metadata(CheckpointReader(folder / name).directory, change)
    return name
