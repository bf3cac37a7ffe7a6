"""A second process computes while this one is timed, and rests afterwards."""

import time
from contextlib import contextmanager
from functools import partial

import pytest

from megatron_tf.errors import UserError
from megatron_tf.planning import calibrate
from megatron_tf.planning.calibrate import MeasuredMachine
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.neighbor import Neighbor
from megatron_tf.planning.network import Network
from tests.support.training import small_run


@contextmanager
def counted(path):
    """Append a letter to a file at each run."""

    def run():
        with path.open("a") as file:
            file.write("x")
        time.sleep(0.01)
        return (0.01,)

    yield run


@contextmanager
def ending():
    """Ends its process."""
    yield lambda: exit(1)


def runs(path):
    return len(path.read_text()) if path.exists() else 0


def test_it_computes_until_the_end_of_the_context_and_then_the_next_work(tmp_path):
    neighbor = Neighbor()
    for name in ("first", "second"):
        path = tmp_path / name
        with neighbor.computing(partial(counted, path)):
            before = runs(path)
            assert before >= 1, "it computes before anything is timed"
            limit = time.monotonic() + 60
            while runs(path) < before + 5:
                assert time.monotonic() < limit
    first = runs(tmp_path / "first")
    time.sleep(0.2)
    assert runs(tmp_path / "first") == first


def test_a_process_that_has_ended_is_reported():
    neighbor = Neighbor()
    for _ in range(2):
        with pytest.raises(UserError, match="has ended: is there memory"), neighbor.computing(ending):
            pytest.fail("nothing computes")


class Asked:
    """Stands for a neighbor."""

    def __init__(self):
        self.works = []

    @contextmanager
    def computing(self, work):
        self.works.append(work)
        yield


@pytest.mark.parametrize("network", [None, Network({})], ids=["one rank", "two ranks"])
def test_what_two_ranks_compute_is_timed_next_to_a_neighbor(monkeypatch, network):
    neighbors = []
    monkeypatch.setattr(calibrate, "Neighbor", lambda: neighbors.append(Asked()) or neighbors[-1])
    machine, planned = MeasuredMachine(network), PlannedLayout(small_run(), 1)
    for _ in range(2):
        machine.part(planned, "layer", 0)
        machine.update(planned, 1000)
    assert [len(neighbor.works) for neighbor in neighbors] == ([] if network is None else [2])
