"""`megatron-tf doctor` finds what is wrong with a machine, and says what to do."""

import itertools
import os
import resource
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from megatron_tf.commands import doctor
from megatron_tf.extras import EXTRAS, how_to_install

NO_INTERFACE = "no-such-interface"


def lower_limit() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@pytest.mark.slow
def test_each_problem_of_a_machine_is_one_line_with_a_remedy():
    """Few open files, no such network interface, a port that is taken: a process of its own has all three."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "megatron_tf", "doctor"],
            env={**os.environ, "GLOO_SOCKET_IFNAME": NO_INTERFACE, "MASTER_PORT": str(port)},
            preexec_fn=lower_limit,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    lines = [line.strip() for line in result.stdout.splitlines()]
    following = dict(itertools.pairwise(lines))
    found = {tuple(line.split()[:2]): line for line in lines if line.startswith(("problem ", "note ", "ok "))}
    gloo, files, busy = found["problem", "gloo"], found["problem", "open"], found["note", "port"]
    assert NO_INTERFACE in gloo
    assert following[gloo] == "-> name a network interface that is up, such as lo: export GLOO_SOCKET_IFNAME=lo"
    assert "at most 256" in files
    assert following[files].startswith("-> ulimit -n ")
    assert f"{port} can't be bound" in busy
    assert found["ok", "torch"].split()[-1].startswith("2.")
    assert lines[-1] == f"{sum(line.startswith('problem ') for line in lines)} problem(s)"
    assert result.returncode == 1
    assert result.stderr == ""


def test_a_machine_without_a_problem_exits_with_0(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", [("versions", doctor.versions)])
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no problem found"


def test_a_package_that_is_missing_or_does_not_import_is_told_with_the_remedy(monkeypatch):
    def version(package: str) -> str:
        if package in ("sentencepiece", "wandb", "apex"):
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor, "_import_error", lambda name: "undefined symbol: _ZN3c10" if "flash" in name else "")
    required = {finding.subject: finding for finding in doctor.versions()}
    assert required["sentencepiece"] == (
        doctor.PROBLEM,
        "sentencepiece",
        "not installed",
        how_to_install("sentencepiece"),
    )
    optional = {finding.subject: finding for finding in doctor.optional_packages()}
    assert optional["wandb"].level == doctor.NOTE
    assert optional["wandb"].remedy == "pip install '.[wandb]' in a clone of megatron_tf"
    assert optional["apex"].remedy == "build it from its sources"
    assert optional["flash_attn"].level == doctor.PROBLEM
    assert "undefined symbol" in optional["flash_attn"].text
    assert optional["triton"].level == doctor.OK


def test_an_extension_that_does_not_load_is_a_problem(monkeypatch):
    def fail(name: str) -> None:
        raise ImportError("GLIBCXX_3.4.32 not found\nand more")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    first = next(doctor.compiled_code())
    assert first[:3] == (doctor.PROBLEM, "data._index", "can't be loaded: GLIBCXX_3.4.32 not found")


@pytest.mark.parametrize("port, reason", [("abc", "MASTER_PORT is 'abc'"), ("70000", "0-65535")])
def test_a_port_that_is_none_is_a_problem(port, reason, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", port)
    finding = doctor._port()
    assert finding.level == doctor.PROBLEM
    assert reason in finding.text
    assert "export MASTER_PORT" in finding.remedy


@pytest.mark.parametrize("value, level", [("", doctor.OK), ("no-such-compiler -O3", doctor.NOTE)])
def test_the_compiler_is_the_one_that_the_environment_names(value, level, monkeypatch):
    monkeypatch.setenv("CXX", value)
    monkeypatch.setattr(doctor.shutil, "which", lambda program: f"/bin/{program}" if program == "c++" else None)
    (finding,) = (found for found in doctor.compiled_code() if found.subject == "compiler")
    assert finding.level == level
    assert (finding.text == "/bin/c++") == (level == doctor.OK)


def test_the_report_covers_every_optional_package():
    assert doctor.PURPOSES.keys() == EXTRAS.keys() | {"apex"}
