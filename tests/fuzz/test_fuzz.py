"""Hostile index files under the address and undefined-behaviour sanitizers."""

import re
import subprocess

import pytest

from tests.support.data import write_data_set
from tests.support.paths import ROOT

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-std=c++20", "-I", ROOT / "csrc"]
RUNS = 300_000


def compile_cpp(*arguments):
    command = ["g++", *map(str, SANITIZE), *map(str, arguments)]
    subprocess.run(command, check=True, timeout=120)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    """The reader with its edges traced, the fuzzer without."""
    folder = tmp_path_factory.mktemp("fuzz")
    reader = folder / "reader.o"
    compile_cpp("-fsanitize-coverage=trace-pc", "-c", ROOT / "csrc" / "indexed_dataset.cpp", "-o", reader)
    compile_cpp(ROOT / "tests" / "fuzz" / "fuzz_index.cpp", reader, "-o", folder / "fuzz_index")
    return folder / "fuzz_index"


def test_no_index_crashes_the_reader_or_is_read_wrongly(fuzzer, tmp_path):
    for name, documents in (("a", [[1, 2], [], [3]]), ("b", []), ("c", [[1]] * 20)):
        write_data_set(tmp_path / name, documents)
    starts = sorted(map(str, tmp_path.glob("*.idx")))
    done = subprocess.run([fuzzer, str(RUNS), "1", *starts], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    runs, accepted, edges_before, edges, _, corpus = map(int, re.findall(r"\d+", done.stdout))
    assert runs == RUNS
    assert accepted > 100
    assert edges > edges_before + 10
    assert corpus > 10
