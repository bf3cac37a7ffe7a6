"""A miniature of the growth study from the text to the results, killed once in the middle."""

import contextlib
import json
import os
import signal
import sys
import time

import pytest

from tests.support.commands import run
from tests.support.paths import EXAMPLES
from tests.support.runs import children_of
from tests.support.study import MINIATURE, STUDY

STEPS = {"tokenformer_small": 12, "tokenformer_large": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The prepared text."""
    folder = tmp_path_factory.mktemp("study") / "data"
    options = ["--output", folder, "--held-out-bytes", "20000", "--vocab-size", "512"]
    done = run(STUDY / "prepare.py", EXAMPLES / "data" / "pile_sample_heldout.jsonl.zst", *options)
    assert done.returncode == 0, done.stderr
    return folder


def command(folder, data):
    (folder / "study.yaml").write_text(MINIATURE)
    places = [
        "--study",
        folder / "study.yaml",
        "--data",
        data,
        "--runs",
        folder / "runs",
        "--results",
        folder / "results",
    ]
    return [STUDY / "run.py", *places, "--final"]


def results(folder):
    """Return the lines of each file without what depends on the machine."""
    found = {}
    for path in sorted((folder / "results").glob("*.jsonl")):
        found[path.name] = [json.loads(line) for line in path.read_text().splitlines()]
        for result in found[path.name]:
            assert result.pop("seconds") > 0
    return found


def kill_in_the_middle(process, runs):
    """Kill run.py and its runs once one of them has saved and trained on."""
    limit = time.monotonic() + 90
    while not any(path.read_bytes().count(b'"loss"') >= 6 for path in runs.glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)
    children = children_of(process.pid)
    for pid in [process.pid, *children]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert children
    process.wait()


def test_a_killed_study_has_the_same_results(start, data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = run(*command(whole, data), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    kill_in_the_middle(start(sys.executable, *command(killed, data)), killed / "runs")
    assert not all((killed / "results" / f"{arm}.jsonl").exists() for arm in (*STEPS, "zero_key"))
    done = run(*command(killed, data), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = results(whole)
    assert expected.keys() == {"tokenformer_large.jsonl", "tokenformer_small.jsonl", "zero_key.jsonl"}
    assert results(killed) == expected
    check(expected)
    assert [path.name for path in (killed / "runs").iterdir()] == ["lock"]  # nothing that no run needs is left
    again = run(*command(killed, data))
    assert again.returncode == 0
    assert "3 results, 0 runs to do" in again.stdout
    assert "start" not in again.stdout


def check(found):
    """Check the totals: the FLOPs of the small run count, and the data continue where it ended."""
    (small,), (large,), (grown,) = (found[f"{arm}.jsonl"] for arm in (*STEPS, "zero_key"))
    for result, steps in ((small, 12), (large, 24)):
        assert result["tokens"] == 4 * 32 * steps
        assert result["stage_flops"] == result["flops"]
    assert grown["parent"] == small["id"]
    assert grown["flops"] - grown["stage_flops"] == small["flops"]
    assert grown["flops"] == pytest.approx(large["flops"], abs=0.5 * large["flops"] / 24)
    assert grown["parameters"] == large["parameters"]
    assert [step for step, *_ in grown["evaluations"]] == [12, 13, 16, 20, 26]
    assert grown["growth"] == [12]
    before, after = small["evaluations"][-1], grown["evaluations"][0]
    assert after[:3] == before[:3]
    assert after[3] == pytest.approx(before[3], abs=1e-5)  # zero keys keep the output
    assert grown["losses"].keys() == small["losses"].keys()
    assert len(grown["losses"]) > 1
