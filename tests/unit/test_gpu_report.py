"""The GPU report's logic, at tiny shapes on a CPU: it finds what is wrong, says so, and resumes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_report import collect, correctness, sections
from benchmarks.gpu_report.report import failures, write_report
from benchmarks.gpu_report.result import Result, read_result
from benchmarks.gpu_report.scale import choose_scale
from megatron_tf.kernels.eager import EagerKernels

CPU = torch.device("cpu")
SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


def test_a_number_passes_up_to_its_limit_and_nan_never_does():
    result = Result()
    for found in (1.0, 1.1, float("nan")):
        result.at_most("it", found, 1.0)
    assert [check.passed for check in result.checks] == [True, False, False]


def test_an_exception_is_a_failed_check_and_the_section_keeps_what_it_had(tmp_path):
    result = Result(path=tmp_path / "section.json")
    result.at_most("before", 0.0, 1.0)
    with result.guarded("middle"):
        raise ValueError("the reason\nand more")
    result.at_most("after", 0.0, 1.0)
    read = read_result(tmp_path / "section.json")
    assert [(check.name, check.passed) for check in read.checks] == [
        ("before", True),
        ("middle", False),
        ("after", True),
    ]
    assert read.checks[1].found == "ValueError: the reason"


def test_the_report_lists_what_is_wrong_and_which_goals_are_met(tmp_path):
    good, bad = Result(is_complete=True), Result(is_complete=False)
    good.figures["deterministic / usual"] = 1.05
    good.table("Times", "what", "ms")("a | b", 1)
    bad.at_most("the error", 2.0, 1.0)
    results = {"good": good, "bad": bad}
    text = write_report(tmp_path, {"device": "a card, 1 GiB"}, results).read_text()
    assert failures(results) == ["bad: the error: 2, the limit is <= 1", "bad: it did not finish"]
    assert "- bad: the error: 2, the limit is <= 1" in text
    assert "| a / b | 1 |" in text
    assert "| time of a deterministic step over a usual one | at most 1.1 | 1.050, met |" in text
    assert json.loads((tmp_path / "report.json").read_text())["figures"] == {"deterministic / usual": 1.05}


class _WrongGradient(EagerKernels):
    def backward(self, *args, **kwargs):
        weights, grad = super().backward(*args, **kwargs)
        return weights, grad * 1.001


@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
@pytest.mark.parametrize("length", [1, 7, 1000])
def test_the_kernels_check_passes_eager_kernels(norm, length):
    sizes = {"size": 1e2, "dtype": torch.float32, "device": CPU}
    assert correctness._kernel_error(EagerKernels(), norm, length, **sizes) < 1e-5


@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_the_kernels_check_finds_a_gradient_that_is_wrong_by_a_thousandth(norm):
    error = correctness._kernel_error(_WrongGradient(), norm, 1000, size=1.0, dtype=torch.float32, device=CPU)
    assert error > 5e-4


def test_golden_and_models_pass_on_a_cpu_and_are_not_run_again(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--output", str(tmp_path)]
    first = subprocess.run([*command, "--sections", "golden"], capture_output=True, text=True, check=True)
    assert "golden:" in first.stdout
    assert "0 of 10 checks fail" in first.stdout
    for name in sections.SECTIONS:
        if name not in ("golden", "graph"):
            Result(path=tmp_path / f"sections/{name}.json", is_complete=True).write()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "graph:" in again.stdout
    assert "golden:" not in again.stdout


def test_an_unknown_section_is_named_and_nothing_runs(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--output", str(tmp_path), "--sections", "gold"]
    job = subprocess.run(command, capture_output=True, text=True, check=False)
    assert job.returncode == 2
    assert "error: no section gold: choose from ceilings, golden" in job.stderr


def test_a_section_that_ends_the_process_is_named_and_the_others_run(tmp_path, monkeypatch):
    calls = []

    def fake_run(command, check):
        names = command[command.index("--run-sections") + 1 :]
        calls.append(names)
        codes = {"golden": 3, "losses": -signal.SIGALRM}
        for name in names:
            Result(path=tmp_path / f"{name}.json", is_complete=name not in codes).write()
            if name in codes:
                return subprocess.CompletedProcess(command, codes[name])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sections.subprocess, "run", fake_run)
    names = ["ceilings", "golden", "models", "losses", "graph"]
    sections.run_in_process(names, [], tmp_path)
    assert calls == [names, names[2:], names[4:]]
    wrong = failures({name: read_result(tmp_path / f"{name}.json") for name in names})
    assert wrong == [
        "golden: golden: its process ended with 3",
        "golden: it did not finish",
        "losses: losses: stopped after 120 s",
        "losses: it did not finish",
    ]


def test_a_section_that_hangs_is_ended_by_its_alarm(tmp_path):
    child = os.fork()
    if child == 0:
        sections.SECTIONS["golden"] = (lambda scale, result: signal.pause(), 1)
        sections.run_sections(["golden"], choose_scale(CPU, is_quick=True), tmp_path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGALRM
    assert not read_result(tmp_path / "golden.json").is_complete


def test_every_package_to_collect_has_a_tested_version():
    requirements = (collect.REPOSITORY / "requirements/tested.txt").read_text()
    assert set(collect.COLLECTED) <= dict(collect._versions(requirements)).keys()
