"""Ranks of another run, that never meet, or that see other data are refused, in one line on every rank."""

import os
import shutil
import socket
import sys
import time

import pytest
import yaml

from tests.support.commands import ENVIRONMENT, free_port, make_run
from tests.support.paths import ROOT
from tests.support.processes import PythonProcess

LIMIT = 6
WAIT = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("identity"))


def start(folder, rank, port, *options, size=2, **environment):
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    limit = f"--parallel.distributed_timeout_seconds={LIMIT}"
    return PythonProcess(
        [sys.executable, "-m", "megatron_tf.pretrain", str(folder / "run.yaml"), limit, *options],
        cwd=environment.pop("cwd", ROOT),
        environment={**ENVIRONMENT, **places, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
    )


def outcome(*ranks):
    """(exit codes, what each rank says on its standard error), which is one line of each."""
    errors = [rank.communicate(timeout=WAIT)[1] for rank in ranks]
    for error in errors:
        assert len(error.splitlines()) == 1, error
    return [rank.returncode for rank in ranks], errors


@pytest.mark.parametrize(
    "option, message",
    [
        ("--optimizer.lr=0.1", "optimizer.lr is 0.1, but 0.001 on rank 0"),
        ("--parallel.pipeline_model_parallel_size=3", "parallel.pipeline_model_parallel_size is 3, but 1 on rank 0"),
    ],
)
def test_a_rank_with_another_configuration_is_refused_with_the_key(folder, option, message):
    port = free_port()
    codes, errors = outcome(start(folder, 0, port), start(folder, 1, port, option))
    assert codes == [1, 1]
    for error in errors:
        assert f"rank 1 (host {socket.gethostname()}): {message}" in error


def test_a_rank_of_another_job_is_refused(folder):
    port = free_port()
    codes, errors = outcome(start(folder, 0, port, SLURM_JOB_ID="41"), start(folder, 1, port, SLURM_JOB_ID="42"))
    assert codes == [1, 1]
    assert all("it belongs to job 42, rank 0 to 41" in error for error in errors)


def test_a_rank_that_sees_other_data_is_refused(folder, tmp_path):
    """Relative paths, from another directory."""
    values = yaml.safe_load((folder / "run.yaml").read_text())
    (prefix,) = values["data"]["data_path"]
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(prefix + suffix, tmp_path / f"copy{suffix}")
        (folder / f"copy{suffix}").write_bytes((tmp_path / f"copy{suffix}").read_bytes())
    contents = bytearray((tmp_path / "copy.bin").read_bytes())
    contents[-1] ^= 1
    (tmp_path / "copy.bin").write_bytes(contents)
    port, option = free_port(), "--data.data_path=[copy]"
    ranks = [
        start(folder, rank, port, option, cwd=cwd, PYTHONPATH=str(ROOT)) for rank, cwd in enumerate((folder, tmp_path))
    ]
    codes, errors = outcome(*ranks)
    assert codes == [1, 1]
    assert all("data.data_path 'copy' has other content than on rank 0" in error for error in errors)


@pytest.mark.parametrize("key", ["data_path", "valid_data_path"])
@pytest.mark.parametrize("lacking", [0, 1])
def test_a_rank_without_a_file_of_the_data_is_told_which(folder, tmp_path, key, lacking):
    (prefix,) = yaml.safe_load((folder / "run.yaml").read_text())["data"]["data_path"]
    places = tmp_path / "0", tmp_path / "1"
    for place in places:
        place.mkdir()
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(prefix + suffix, place / f"copy{suffix}")
    (places[lacking] / "copy.bin").unlink()
    port, option = free_port(), f"--data.{key}=[copy]"
    ranks = [start(folder, rank, port, option, cwd=places[rank], PYTHONPATH=str(ROOT)) for rank in range(2)]
    codes, errors = outcome(*ranks)
    assert codes == [1, 1]
    said = "is missing, but exists on rank 0" if lacking else "exists, but is missing on rank 0"
    for error in errors:
        assert f"rank 1 (host {socket.gethostname()}): data.{key}: copy.bin {said}" in error
        assert "other content" not in error


def test_a_rank_that_does_not_see_the_shared_directory_is_named(folder, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    port, option = free_port(), "--checkpoint.save=saved"
    ranks = [start(folder, rank, port, option, cwd=cwd, PYTHONPATH=str(ROOT)) for rank, cwd in enumerate((here, there))]
    codes, errors = outcome(*ranks)
    assert codes == [1, 1]
    assert all("rank 1" in error and "checkpoint.save (saved)" in error for error in errors)
    assert [*here.glob("saved/*"), *there.glob("saved/*")] == []


def test_a_port_that_is_taken_is_named_on_every_rank_within_the_limit(folder):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port, began = listener.getsockname()[1], time.monotonic()
        codes, errors = outcome(start(folder, 0, port), start(folder, 1, port))
        assert codes == [1, 1]
        assert f"the port of 127.0.0.1:{port} is in use by another program" in errors[0]
        assert f"127.0.0.1:{port}" in errors[1]
        assert time.monotonic() - began < LIMIT + 30  # python and torch start in some of it


def test_ranks_that_never_come_are_told_of(folder):
    port = free_port()
    codes, (error,) = outcome(start(folder, 0, port))
    assert codes == [1]
    assert f"not all 2 ranks connected to 127.0.0.1:{port} within {LIMIT} s" in error


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"MASTER_ADDR": "nosuchhost.invalid"}, "MASTER_ADDR nosuchhost.invalid (port "),
        ({"MASTER_PORT": "x"}, "MASTER_PORT"),
        ({"RANK": "2"}, "RANK is 2 of WORLD_SIZE 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is not a number"),
    ],
)
def test_an_environment_that_leads_nowhere_is_named(folder, facts, message):
    codes, (error,) = outcome(start(folder, 0, free_port(), **facts))
    assert codes == [1]
    assert message in error


def test_the_interface_is_the_one_that_leads_to_the_first_rank(monkeypatch):
    from megatron_tf.parallel import rendezvous

    monkeypatch.setattr(os, "environ", {"MASTER_ADDR": "10.77.0.1", "WORLD_SIZE": "2"})
    monkeypatch.setattr(rendezvous, "_address_of", lambda host: host if host[0].isdigit() else "127.0.1.1")
    monkeypatch.setattr(rendezvous, "_source_towards", lambda target: {"10.77.0.1": "10.77.0.2"}[target])
    monkeypatch.setattr(rendezvous, "_interface_of", lambda address: {"10.77.0.2": "veth2"}[address])
    rendezvous._choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "veth2"


def test_the_interface_of_loopback_is_found():
    from megatron_tf.parallel import rendezvous

    assert rendezvous._interface_of("127.0.0.1") == "lo"
    assert rendezvous._interface_of("203.0.113.9") is None
