"""Joining the other ranks: what goes wrong in the thread that waits for them is raised where it is awaited."""

from datetime import timedelta

import pytest
import torch

from megatron_tf.parallel import rendezvous
from megatron_tf.parallel.launch import LaunchError
from tests.support.commands import free_port

LIMIT = timedelta(seconds=30)


def join(monkeypatch, check, **environment):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in (alone | environment).items():
        monkeypatch.setenv(name, value)
    return rendezvous.join_ranks("gloo", torch.device("cpu"), timeout=LIMIT, limit=LIMIT, check=check)


@pytest.mark.parametrize("error", [KeyError("a bug"), LaunchError("ranks differ")], ids=repr)
def test_the_error_of_the_check_is_raised_as_it_is(monkeypatch, error):
    def check(store, rank, size):
        raise error

    with pytest.raises(type(error)) as caught:
        join(monkeypatch, check)
    assert caught.value is error
    assert caught.value.__cause__ is not error


def test_an_error_of_torch_names_the_address(monkeypatch):
    def check(store, rank, size):
        raise RuntimeError("the store is gone")

    with pytest.raises(LaunchError, match=r"rendezvous at 127\.0\.0\.1:\d+ failed: the store is gone"):
        join(monkeypatch, check)


def test_ranks_are_below_their_number(monkeypatch):
    with pytest.raises(LaunchError, match="RANK is 3 of WORLD_SIZE 2"):
        join(monkeypatch, None, RANK="3", WORLD_SIZE="2")
