"""Messages between two ranks are timed, by kind and size."""

import pytest

from megatron_tf.planning.network import Network, time_messages
from megatron_tf.training.dry_run.collectives import Traffic

KINDS = ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"]


def timed(mesh):
    return time_messages(mesh.group("tp"))


def test_larger_messages_take_longer(rank_pool):
    network = rank_pool.run(timed, 2, 1, 1)[0]
    for kind in KINDS:
        small, large = (network.time(Traffic(kind, "tp", 1, size)) for size in (8, 1 << 24))
        assert 0 < small < large, kind


def test_times_between_and_beyond_the_sizes_that_are_timed():
    network = Network({"send": [1.0, 2.0, 2.0, 2.0, 2.0, 4.0, 10.0]})  # at 8 bytes, 4, 64 and 256 kB, 1, 4 and 16 MB
    expected = {1: 1.0, 8: 1.0, 4096: 2.0, 10 << 18: 3.0, 10 << 20: 7.0, 28 << 20: 16.0}
    for size, seconds in expected.items():
        assert network.time(Traffic("send", "pp", 1, size)) == pytest.approx(seconds, rel=0.01), size
    assert network.time(Traffic("send", "pp", 3, 3 << 22)) == pytest.approx(3 * 4.0)
