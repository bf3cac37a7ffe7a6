"""Who is to blame when ranks wait for each other."""

import json
import time
from collections import Counter
from dataclasses import asdict, replace
from threading import Event, Thread

import pytest
import torch.distributed as dist

from megatron_tf.training.supervision import heartbeats, watchdog
from megatron_tf.training.supervision.diagnosis import explain
from megatron_tf.training.supervision.heartbeats import Board, Heartbeat
from megatron_tf.training.supervision.watchdog import LostRankError, Watchdog

ROUNDS = 6
"""Heartbeats that a rank reads at most while it waits for the report of one that responds, two in each round."""


def beat(count, operation="forward-backward of step 7", is_waiting=True, place="x.py:1 in f"):
    return Heartbeat(
        host="node4",
        process=4711,
        count=count,
        operation=operation,
        seconds=60.0,
        place=place,
        is_waiting=is_waiting,
        has_ended=operation.startswith("ended"),
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


def test_a_rank_whose_last_beat_says_that_it_ended_reports_nothing():
    before = {0: beat(5), 1: beat(5)}
    after = {0: beat(6, "ended in data of step 7: data.bin is truncated", place=""), 1: beat(9)}
    assert explain(before, after, rank=1, symptom="").startswith("rank 0 (host node4, pid 4711) has ended")


def test_where_none_waits_all_are_named():
    busy = [{rank: beat(count, "data of step 7", is_waiting=False) for rank in range(5)} for count in (5, 9)]
    said = explain(*busy, rank=0, symptom="")
    assert said.startswith("all ranks are blocked: rank 0")
    assert "and 1 more" in said


@pytest.mark.parametrize("before", [None, beat(3)])
def test_a_rank_that_never_began(before):
    assert "rank 1 never started" in explain({0: beat(5), 1: before}, {0: beat(9), 1: None}, rank=0, symptom="")


class Beating(Thread):
    """The heartbeats of a rank that reports nothing, for some seconds."""

    def __init__(self, store, rank, seconds, *, is_waiting=True):
        super().__init__(daemon=True)
        self.board, self.last, self.is_waiting = Board(store, rank), time.monotonic() + seconds, is_waiting
        self.tell(0)
        self.start()

    def tell(self, count):
        self.board.publish(beat(count, "data of step 7", is_waiting=self.is_waiting))

    def run(self):
        count = 0
        while time.monotonic() < self.last:
            count += 1
            self.tell(count)
            time.sleep(0.02)


def test_a_rank_whose_collective_failed_still_counts_as_one_that_waited(monkeypatch):
    """A rank that exits at its own limit ends the others' collectives while they diagnose."""
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "_place_of", lambda frame: ("collectives.py:33 in all_reduce", True))
    store = dist.HashStore()
    Beating(store, rank=1, seconds=60, is_waiting=False)
    now = lambda: ("forward-backward of step 7", 0.0)  # noqa: E731
    dog = Watchdog(store, rank=0, size=2, now=now, limit_seconds=1e9, end=lambda text: None)
    with pytest.raises(LostRankError) as raised, dog:  # noqa: PT012  # the context is what is tested
        while not dog.position[1]:
            time.sleep(0.01)
        monkeypatch.setattr(watchdog, "_place_of", lambda frame: ("watchdog.py:1 in _diagnose", False))
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    assert "rank 1 (host node4, pid 4711) keeps the others waiting, in data of step 7" in str(raised.value)


def test_a_rank_that_left_the_report_to_another_does_not_count_as_gone():
    before = {0: beat(5), 1: beat(5), 2: beat(5, "data of step 7", is_waiting=False)}
    after = {0: beat(9), 1: replace(before[1], has_left=True), 2: beat(9, "data of step 7", is_waiting=False)}
    assert explain(before, after, rank=0, symptom="").startswith(
        "rank 2 (host node4, pid 4711) keeps the others waiting"
    )
    # also if it was the one that the others waited for, and whichever rank is the lowest
    left = {0: replace(before[2], has_left=True), 1: beat(9), 2: beat(9)}
    assert explain(before, left, rank=1, symptom="").startswith(
        "rank 0 (host node4, pid 4711) keeps the others waiting"
    )
    assert explain(before, left, rank=2, symptom="") is None


class Run:
    """Ranks of a run, in threads; one, by default the last, has reached its limit.

    The silent ones have published one heartbeat.
    """

    def __init__(self, monkeypatch, size, silent=(), *, late=None, patience=8):
        monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.6)
        monkeypatch.setattr(watchdog, "_PATIENCE_BEATS", patience)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.read, self.rounds = Counter(), Counter()
        self.confirmed = {}
        self.ends = [Event() for _ in range(size)]
        self.reports = {}
        self.board = Board(self.store, size)
        read = Board.read
        monkeypatch.setattr(Board, "read", lambda board, ranks: self.count(board, ranks) or read(board, ranks))
        start = time.perf_counter()
        self.dogs = [
            Watchdog(
                self.store,
                rank=rank,
                size=size,
                now=lambda: ("forward-backward of step 7", start),
                limit_seconds=1e-6 if rank == (size - 1 if late is None else late) else 1e9,
                end=lambda report, rank=rank: self.end(rank, report),
            )
            for rank in range(size)
        ]
        for rank, dog in enumerate(self.dogs):
            dog._tell_position()
            if rank not in silent:
                dog.__enter__()
        for rank in set(range(size)) - set(silent):
            assert self.ends[rank].wait(60), f"rank {rank} does not end"

    def count(self, board, ranks):
        self.read[board.rank] += len(ranks)
        self.rounds[board.rank] += 1

    def end(self, rank, report):
        self.dogs[rank].stop.set()
        self.dogs[rank].is_over.set()
        if report is not None:
            self.reports[rank] = report
        self.confirmed[rank] = self.board.num_confirmed()
        self.ends[rank].set()


def test_a_fault_on_one_rank_ends_all_and_only_the_lowest_reads_every_heartbeat(monkeypatch):
    run = Run(monkeypatch, 16)
    assert list(run.reports) == [0]
    assert run.reports[0].endswith("(the limit of 0 s is reached)")
    assert run.read[0] == 2 * 16
    # nothing at all if the report is there first; while they wait for it, rank 0 alone
    assert all(run.read[rank] <= ROUNDS for rank in range(1, 16)), run.read
    assert run.board.num_confirmed() == 15


def test_if_the_lowest_ranks_are_lost_the_next_one_reports(monkeypatch):
    run = Run(monkeypatch, 12, silent=(0, 1, 2))
    assert list(run.reports) == [3]
    assert run.reports[3].startswith("rank 0 (host ")
    assert "; rank 2 (host " in run.reports[3]
    assert "; rank 3 " not in run.reports[3]
    assert run.read[3] == 2 * (1 + 2 + 12)  # rank 0, the other lower ranks, all
    assert run.rounds[3] == 2 * 3
    assert all(run.read[rank] <= 2 * (1 + 7) + ROUNDS for rank in range(4, 12)), run.read


def test_the_rank_that_reports_waits_until_others_know(monkeypatch):
    """It may host the store, which would be gone."""
    assert Run(monkeypatch, 3, late=0).confirmed[0] > 0


def lonely_rank(monkeypatch, store, patience):
    """(report, last heartbeat) of rank 1, which has reached its limit while rank 0 says nothing."""
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "_PATIENCE_BEATS", patience)
    reports, ended = [], Event()
    end = lambda report: reports.append(report) or dog.stop.set() or ended.set()  # noqa: E731
    dog = Watchdog(store, rank=1, size=2, now=lambda: ("data of step 7", 0.0), limit_seconds=0, end=end)
    with dog:
        assert ended.wait(60)
        (report,) = reports
        return report, Board(store, 0).read([1])[1]


def test_a_rank_that_is_lost_before_it_reports_is_reported(monkeypatch):
    store = dist.HashStore()
    Beating(store, rank=0, seconds=0.7)
    report, last = lonely_rank(monkeypatch, store, patience=100)
    assert report.startswith("rank 0 (host node4, pid 4711) is gone or frozen")
    assert not last.has_left


def test_a_rank_leaves_the_report_to_one_that_responds_for_long(monkeypatch):
    store = dist.HashStore()
    Beating(store, rank=0, seconds=60)
    report, last = lonely_rank(monkeypatch, store, patience=4)
    assert report is None
    assert last.has_left


def test_heartbeats_are_read_in_one_answer_and_missing_ones_do_not_block_it():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    board = Board(store, 0)
    for rank in set(range(600)) - {3, 599}:
        store.set(f"beat/{rank}", json.dumps(asdict(beat(rank))))
    asked = []
    board._ask = lambda question: asked.append(question) or question()
    assert board.read(range(100, 300)) == {rank: beat(rank) for rank in range(100, 300)}
    assert len(asked) == 2
    beats = board.read(range(600))
    assert list(beats) == list(range(600))
    assert [rank for rank, each in beats.items() if each is None] == [3, 599]
    assert all(beats[rank] == beat(rank) for rank in set(beats) - {3, 599})
    assert len(asked) < 60


def test_a_store_that_does_not_answer_counts_as_lost(monkeypatch):
    monkeypatch.setattr(heartbeats, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.05)
    store = dist.HashStore()
    ended, frozen, reports = Event(), Event(), []
    end = lambda report: reports.append(report) or dog.stop.set() or ended.set()  # noqa: E731
    dog = Watchdog(store, rank=1, size=2, now=lambda: ("data of step 7", 0.0), limit_seconds=0, end=end)
    monkeypatch.setattr(Board, "_read_batch", lambda board, ranks: board._ask(frozen.wait))
    with dog:
        assert ended.wait(20)
    frozen.set()
    written = store.get("beat/1")
    dog.board.publish(beat(1_000))  # would wait for it, too
    assert store.get("beat/1") == written
    assert reports == [
        "the rank that hosts the run's store, usually rank 0, is gone or frozen (the limit of 0 s is reached)"
    ]


def test_a_rank_that_is_alarmed_leaves_its_end_to_its_failing_collective(monkeypatch):
    """Its main thread closes the logs, which an exit from another thread would not."""
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.05)
    store, ends = dist.HashStore(), []
    dog = Watchdog(store, rank=0, size=2, now=lambda: ("data of step 7", 0.0), limit_seconds=1e9, end=ends.append)
    with pytest.raises(LostRankError) as raised, dog:  # noqa: PT012  # the context is what is tested
        Board(store, 1).raise_alarm("(Connection closed by rank 1)")
        store.wait([heartbeats.REPORT])
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    assert str(raised.value) == "rank 1 never started (Connection closed by rank 1)"
    assert not ends
