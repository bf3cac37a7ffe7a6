"""The clock of a run: its phases share all of the time, in one order."""

from types import SimpleNamespace

from megatron_tf.training.observability import step_timer
from megatron_tf.training.observability.step_timer import StepTimer


def test_phases_share_all_of_the_time_in_one_order(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: clock.now)
    timer = StepTimer()
    for seconds, following in [(4, "optimizer"), (2, "saving"), (1, "data"), (3, "optimizer"), (1, "report")]:
        clock.now += seconds
        timer.enter(following)
    clock.now += 5
    first = timer.take()
    assert list(first.items()) == [("start", 4), ("data", 3), ("optimizer", 3), ("report", 5), ("saving", 1)]
    assert sum(first.values()) == timer.lap() == clock.now - 100
    clock.now += 2
    assert timer.take() == {"report": 2}
    assert timer.lap() == 2
