"""Inputs and outputs by name: different things never become one, and one thing is never read twice."""

import os
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_tf.data import inputs as inputs_module
from megatron_tf.data.document_sets import ROW, DocumentSets, read_document_sets, sets_path
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.inputs import find_inputs
from megatron_tf.data.output_names import dataset_names, file_stem, output_of, set_name


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small tree of files, which is the current directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("part[1].jsonl", "part1.jsonl", "pile/top.jsonl", "pile/00/a.jsonl", "pile/00/deep/b.jsonl"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    (tmp_path / "data[2]").mkdir()
    (tmp_path / "data[2]" / "c.jsonl").write_text("{}\n")
    (tmp_path / "pile" / ".hidden").mkdir()
    (tmp_path / "pile" / ".hidden" / "x.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (["part[1].jsonl"], ["part[1].jsonl"]),
        (["part[12].jsonl"], ["part1.jsonl"]),
        (["part*.jsonl"], ["part1.jsonl", "part[1].jsonl"]),
        (["data[2]/*.jsonl"], ["data[2]/c.jsonl"]),
        (["pile/**/*.jsonl"], ["pile/00/a.jsonl", "pile/00/deep/b.jsonl", "pile/top.jsonl"]),
        (["**/b.jsonl"], ["pile/00/deep/b.jsonl"]),
        (["pile/**"], ["pile/00/a.jsonl", "pile/00/deep/b.jsonl", "pile/top.jsonl"]),
        (["pile/?0/*.jsonl", "part1.jsonl"], ["pile/00/a.jsonl", "part1.jsonl"]),
    ],
)
def test_patterns_match_the_files_that_are_meant(tree, patterns, expected):
    assert [str(path) for path in find_inputs(patterns)] == expected
    assert [str(path) for path in find_inputs([str(tree / pattern) for pattern in patterns])] == [
        str(tree / name) for name in expected
    ]


def test_a_circle_of_links_is_walked_once(tree):
    (tree / "pile" / "00" / "up").symlink_to(tree / "pile")
    assert len(find_inputs(["pile/**/*.jsonl"])) == 3


@pytest.mark.parametrize("other", ["./part1.jsonl", "pile/../part1.jsonl", "link.jsonl", "hard.jsonl", "p*1.jsonl"])
def test_one_file_under_two_names_is_refused(tree, other):
    (tree / "link.jsonl").symlink_to("part1.jsonl")
    os.link(tree / "part1.jsonl", tree / "hard.jsonl")
    with pytest.raises(DataError, match=r"names a file twice: part1\.jsonl and "):
        find_inputs(["part1.jsonl", other])


def test_what_is_matched_but_not_a_file_is_refused(tree):
    (tree / "pile" / "broken.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(DataError, match=r"broken\.jsonl: it is a broken link"):
        find_inputs(["pile/*.jsonl"])
    (tree / "spark.jsonl").mkdir()
    with pytest.raises(DataError, match=r"spark\.jsonl is a directory"):
        find_inputs(["*.jsonl"])
    os.mkfifo(tree / "pipe")
    with pytest.raises(DataError, match="pipe is not a regular file"):
        find_inputs(["pipe"])
    with pytest.raises(DataError, match="no such file"):
        find_inputs(["nothing*.jsonl"])


def test_a_directory_that_cannot_be_read_is_an_error(tree, monkeypatch):
    listed = os.listdir

    def refuse(directory):
        if str(directory).endswith("00"):
            raise PermissionError(13, "Permission denied", directory)
        return listed(directory)

    monkeypatch.setattr(inputs_module.os, "listdir", refuse)
    for pattern in ("pile/*/*.jsonl", "pile/**/*.jsonl"):
        with pytest.raises(PermissionError, match="pile/00"):
            find_inputs([pattern])


VALUES = [
    "C",
    "C++",
    "C#",
    "C ",
    "日本語",
    "中文",
    "한국어",
    "",
    " ",
    "a",
    "a_b",
    "a b",
    "A/B c",
    "x" * 300,
    "y" * 5000,
]


def test_different_values_and_keys_have_different_data_sets():
    outputs = [output_of(key, set_name(value)) for value in VALUES for key in ("text", "b_text")]
    names = dataset_names("out", outputs, is_split=True)
    assert len(set(names.values())) == len(outputs) == len(names)
    assert all(len(name) < 200 for name in names.values())
    assert names[output_of("text", "C")] == "out_C_text_document"
    alone = dataset_names("out", [output_of("text", "A/B c")], is_split=True)
    assert list(alone.values()) == ["out_A_B_c_text_document"]


@given(st.lists(st.text(max_size=6), unique=True, max_size=12))
def test_any_values_have_different_names(values):
    outputs = [output_of("text", set_name(value)) for value in values]
    assert len(set(dataset_names("p", outputs, is_split=True).values())) == len(values)
    stems = {file_stem(output) for output in outputs}
    assert len(stems) == len(values)
    assert all("/" not in stem and len(stem) < 120 for stem in stems)


def test_names_of_sets_are_short_and_stay_apart(tmp_path):
    """A fixed width is stored for all of them; and numpy takes a NUL at the end away."""
    names = [set_name(value) for value in ("x" * 700_000, "x" * 700_001, "a", "a\0", "a\0\0")]
    assert len(set(names)) == 5
    rows = np.array([(place, 1) for place in range(5)], ROW)
    DocumentSets(names, rows).write(sets_path(tmp_path / "d"))
    assert read_document_sets(tmp_path / "d", 5).names == names
    assert sets_path(tmp_path / "d").stat().st_size < 10_000
