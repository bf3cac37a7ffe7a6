"""Which rank the others wait for: the one whose own work takes longer than the same work on other ranks."""

from types import SimpleNamespace

import pytest
import torch

from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.observability import step_timer
from megatron_tf.training.observability.step_timer import StepTimer
from megatron_tf.training.observability.stragglers import StragglerDetector, slowest_rank

EVEN = [0.01, 1.0, 0.02]
"""Seconds of data, computation and report."""


def slowest_of(*stages):
    return slowest_rank(torch.tensor(stages, dtype=torch.float64))


@pytest.mark.parametrize("phase, name", enumerate(["data", "computation", "report"]))
@pytest.mark.parametrize("rank", [0, 2, 3])
def test_the_slowest_rank_and_its_phase_are_named_with_the_median_of_the_others(rank, phase, name):
    seconds = [list(EVEN) for _ in range(4)]
    seconds[rank][phase] += 1.03
    slowest = slowest_of(seconds)
    assert (slowest.rank, slowest.phase) == (rank, name)
    assert slowest.slowdown == pytest.approx(2.0)
    assert slowest.seconds == pytest.approx(EVEN[phase] + 1.03)
    assert slowest.median_seconds == pytest.approx(EVEN[phase])


def test_a_rank_is_compared_with_the_others_alone():
    assert slowest_of([EVEN, [0.01, 3.07, 0.02]]).slowdown == pytest.approx(3.1 / 1.03)
    # the lower one of an even number, as of the other two here
    assert slowest_of([EVEN, [0.01, 2.0, 0.02], [0.01, 4.0, 0.02]]).slowdown == pytest.approx(4.03 / 1.03)


def test_even_ranks_have_no_slowdown_and_one_other_outlier_does_not_hide_the_slowest():
    assert slowest_of([EVEN] * 8).slowdown == pytest.approx(1.0)
    slowest = slowest_of([EVEN, [0.01, 2.0, 0.02], EVEN, [0.01, 4.0, 0.02], EVEN])
    assert (slowest.rank, slowest.slowdown) == (3, pytest.approx(4.03 / 1.03))


def test_the_work_of_all_phases_counts_and_the_phase_with_the_most_seconds_more_is_named():
    slowest = slowest_of([EVEN, EVEN, [0.9, 1.2, 0.02], [0.01, 1.5, 0.02]])
    assert (slowest.rank, slowest.phase) == (2, "data")
    slowest = slowest_of([EVEN, EVEN, [0.1, 2.0, 0.02]])
    assert (slowest.rank, slowest.phase) == (2, "computation")


def test_stages_are_compared_within_themselves():
    """The second stage works twice as long by design; on the first, rank 1 is slow."""
    slowest = slowest_of([EVEN, [0.01, 1.5, 0.02]], [[0.01, 2.0, 0.02]] * 2)
    assert (slowest.rank, slowest.phase) == (1, "computation")
    slowest = slowest_of([EVEN] * 2, [[0.01, 2.0, 0.02], [2.01, 2.0, 0.02]])
    assert (slowest.rank, slowest.phase) == (3, "data")


def test_a_short_phase_that_is_many_times_longer_does_not_count_as_such():
    assert slowest_of([EVEN, [0.1, 1.0, 0.02]]).slowdown < 1.1


def test_computation_is_the_mean_of_the_profiled_steps_without_communication_and_kept_until_the_next():
    detector = StragglerDetector(Mesh(torch.device("cpu")))
    detector.is_enabled = True
    seen = []
    detector.mesh = SimpleNamespace(group=lambda axis: seen.append(axis))
    detector.num_stages = 1
    with pytest.MonkeyPatch.context() as patch:
        module = "megatron_tf.training.observability.stragglers.slowest_rank"
        patch.setattr(module, lambda seconds: seconds.flatten().tolist())
        assert detector.find_slowest({"data": 1.0}, 10) is None  # nothing is profiled yet
        detector.on_profile(3.0, 1.0)
        detector.on_profile(5.0, 1.0)
        assert detector.find_slowest({"data": 1.0, "report": 2.0}, 10) == pytest.approx([0.1, 3.0, 0.2])
        assert detector.has_new_profile
        assert detector.find_slowest({"data": 1.0}, 4) == pytest.approx([0.25, 3.0, 0.0])
        assert not detector.has_new_profile
        detector.on_profile(2.0, 1.0)
        assert detector.find_slowest({}, 4) == pytest.approx([0.0, 1.0, 0.0])
        detector.reset()
        assert detector.find_slowest({}, 4) is None
    assert seen == 3 * ["tp", "cp", "dp", "pp"]


def test_waiting_is_told_apart_within_a_phase(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: clock.now)
    timer = StepTimer()
    timer.enter("report")
    clock.now += 2
    with timer.waiting():
        clock.now += 3
    clock.now += 1
    assert timer.take()["report"] == 6
    waits = timer.take_waits()
    assert waits["report"] == sum(waits.values()) == 3
    assert sum(timer.take_waits().values()) == 0
