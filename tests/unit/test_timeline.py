"""The timeline of every schedule: complete, in order, possible where the checks say, with the papers' bubbles."""

import itertools
from fractions import Fraction

import pytest

from megatron_tf.parallel.schedules import SCHEDULES, needed_micro_batches
from megatron_tf.parallel.stages import stages_of_rank
from megatron_tf.parallel.timeline import (
    Action,
    Costs,
    Pipeline,
    bubble_fraction,
    theoretical_bubble_fraction,
    timeline,
)

PER_RANK = {
    "gpipe": [1],
    "1f1b": [1],
    "interleaved_1f1b": [1, 2, 3],
    "interleaved_zero_bubble": [1, 2, 3],
    "zbv": [2],
    "dualpipev": [2],
}
CASES = [(schedule, per_rank) for schedule, numbers in PER_RANK.items() for per_rank in numbers]


def test_stages_are_dealt_in_a_loop_or_a_v():
    ranks = range(3)
    assert [stages_of_rank(rank, ranks=3, per_rank=2, is_v=False) for rank in ranks] == [[0, 3], [1, 4], [2, 5]]
    assert [stages_of_rank(rank, ranks=3, per_rank=2, is_v=True) for rank in ranks] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(("schedule", "per_rank"), CASES)
def test_every_micro_batch_passes_every_stage_once_and_in_order(schedule, per_rank):
    pipeline, costs = Pipeline(schedule, 4, per_rank, 8), Costs(2, 3, 1)
    slots = timeline(pipeline, costs)
    of_action = {slot.action: slot for slot in slots}
    assert len(of_action) == len(slots)
    last = 4 * per_rank - 1
    for stage in range(last + 1):
        for i in range(8):
            forward = of_action[Action("F", stage, i)]
            whole, half = (of_action.get(Action(kind, stage, i)) for kind in "BI")
            assert (whole is None) != (half is None)
            assert (half is None) == (Action("W", stage, i) not in of_action)
            backward = whole or half
            assert backward.start >= forward.stop
            if half is not None:
                assert of_action[Action("W", stage, i)].start >= half.stop
            if stage:
                before = of_action.get(Action("B", stage - 1, i)) or of_action[Action("I", stage - 1, i)]
                assert forward.start >= of_action[Action("F", stage - 1, i)].stop
                assert before.start >= backward.stop
    for rank in range(4):
        mine = [slot for slot in slots if slot.rank == rank]
        assert {slot.action.stage for slot in mine} == set(pipeline.stages_of(rank))
        assert all(a.stop <= b.start for a, b in itertools.pairwise(mine))
        assert sum(slot.stop - slot.start for slot in mine) == 8 * per_rank * 6


@pytest.mark.parametrize(("schedule", "per_rank"), CASES)
def test_what_is_refused_is_what_torch_can_not_run(schedule, per_rank):
    """But for 1f1b, whose order exists for fewer micro-batches than ranks, which torch refuses when it is built."""
    for ranks in (2, 3, 5):
        for count in range(1, 14):
            refused = needed_micro_batches(schedule, count, ranks) is not None
            try:
                timeline(Pipeline(schedule, ranks, per_rank, count), Costs())
            except (ValueError, AssertionError):
                assert refused, (ranks, count)
            else:
                assert not refused or schedule == "1f1b", (ranks, count)


BUBBLES = {"gpipe": 6, "1f1b": 6, "interleaved_1f1b": 6, "interleaved_zero_bubble": 2}
"""In units, for F = I = W = 2, of each rank but one."""


@pytest.mark.parametrize(("schedule", "per_rank"), CASES)
@pytest.mark.parametrize(("ranks", "count"), [(2, 8), (4, 8), (4, 32)])
def test_the_bubble_is_the_theoretical_one(schedule, per_rank, ranks, count):
    pipeline, costs = Pipeline(schedule, ranks, per_rank, count), Costs(2, 2, 2)
    found = bubble_fraction(timeline(pipeline, costs))
    bubble = (ranks - 1) * BUBBLES.get(schedule, 2)
    assert found == pytest.approx(float(Fraction(bubble, bubble + count * per_rank * 6)), abs=1e-12)
    if schedule == "dualpipev":  # the paper's formula is that of other orders: it is an upper bound here
        assert found < theoretical_bubble_fraction(pipeline, costs)
    else:
        assert found == pytest.approx(theoretical_bubble_fraction(pipeline, costs), abs=1e-12)


def test_every_schedule_of_the_configuration_is_known():
    assert SCHEDULES.keys() == PER_RANK.keys()
