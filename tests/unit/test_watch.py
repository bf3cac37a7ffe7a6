"""Who is to blame when ranks wait for each other."""

import pytest

from megatron_tf.training.supervision.watchdog import Heartbeat, explain


def beat(count, operation="forward-backward of step 7", is_waiting=True, place="x.py:1 in f"):
    return Heartbeat(
        host="node4",
        process=4711,
        count=count,
        operation=operation,
        seconds=60.0,
        place=place,
        is_waiting=is_waiting,
    )


def test_a_rank_whose_beat_stands_still_is_named_by_the_first_that_is_left():
    before = {0: beat(5), 1: beat(5, "data of step 7", is_waiting=False), 2: beat(5)}
    after = {0: beat(5), 1: beat(9, "data of step 7", is_waiting=False), 2: beat(9)}
    said = explain(before, after, rank=1, symptom="(why)")
    assert said == (
        "rank 0 (host node4, pid 4711) is gone or frozen, last heard of in forward-backward of step 7 for 60 s, "
        "at x.py:1 in f (why)"
    )
    assert explain(before, after, rank=2, symptom="(why)") is None


def test_a_rank_that_works_on_keeps_those_waiting_that_wait():
    before = {rank: beat(5) for rank in range(3)}
    after = {0: beat(9), 1: beat(9), 2: beat(9, "data of step 7", is_waiting=False, place="loader.py:58 in read")}
    said = explain(before, after, rank=0, symptom="(why)")
    assert said.startswith("rank 2 (host node4, pid 4711) keeps the others waiting, in data of step 7 for 60 s")
    assert "loader.py:58 in read" in said


def test_a_rank_that_failed_is_named_with_its_error():
    before = {0: beat(5), 1: beat(5)}
    after = {0: beat(9), 1: beat(6, "ended in data of step 7: data.bin is truncated", place="")}
    assert "rank 1 (host node4, pid 4711) has ended in data of step 7: data.bin is truncated" in explain(
        before, after, rank=0, symptom=""
    )
    long_ago = {0: beat(5), 1: after[1]}
    assert "rank 1 (host node4, pid 4711) has ended" in explain(long_ago, after, rank=0, symptom="")


def test_where_all_wait_all_are_named_up_to_four():
    beats = {rank: beat(5) for rank in range(6)}
    later = {rank: beat(9) for rank in range(6)}
    said = explain(beats, later, rank=0, symptom="")
    assert said.startswith("all ranks are blocked: rank 0")
    assert "and 2 more" in said


@pytest.mark.parametrize("before", [None, beat(3)])
def test_a_rank_that_never_began(before):
    assert "rank 1 never began" in explain({0: beat(5), 1: before}, {0: beat(9), 1: None}, rank=0, symptom="")
