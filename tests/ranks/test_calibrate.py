"""Messages between two ranks are timed."""

from megatron_tf.planning.calibrate import MeasuredMachine, time_messages
from megatron_tf.training.dry_run.collectives import Traffic


def timed(mesh):
    return time_messages(mesh.group("tp"))


def test_larger_messages_take_longer(rank_pool):
    machine = MeasuredMachine(rank_pool.run(timed, 2, 1, 1)[0])
    small, large = (machine.collective(Traffic("all-reduce", "tp", 1, size), size=2, stride=1) for size in (4, 1 << 30))
    assert 0 < small < large
