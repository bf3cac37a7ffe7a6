"""What the watchdog costs at many ranks: simulated ranks in threads, one store, one rank that is lost.

Every rank publishes heartbeats for a while; then all reach their limit at once, while the lost rank is silent. Prints
the load of the store before, the questions and heartbeats read at the fault, and the seconds until the last rank knows
how to end. Fails if not exactly one rank reports, or if another rank than the reporting one reads many heartbeats:
python benchmarks/watchdog.py --ranks 1024
"""

import argparse
import multiprocessing
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_tf.training.supervision.heartbeats import Board, Heartbeat
from megatron_tf.training.supervision.watchdog import Watchdog

T = TypeVar("T")
HEALTHY_SECONDS = 30.0
"""From the start of all ranks to their limit."""
MOST_READ = 128
"""The heartbeats that a rank may read which does not report."""


class SharedConnection:
    """The store as seen by the ranks of one process, which share a connection.

    Opening one looks up a name, which takes 5 s where a name server loses one packet in fifty.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store = store

    def clone(self) -> "SharedConnection":
        """Return this connection."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class CountingBoard(Board):
    """A board that counts the questions to the store and the heartbeats read."""

    def __init__(self, store: Any, rank: int) -> None:
        super().__init__(store, rank)
        self.counts: Counter[str] = Counter()

    def read(self, ranks: Sequence[int]) -> dict[int, Heartbeat | None]:
        """Count and read."""
        self.counts["read"] += len(ranks)
        return super().read(ranks)

    def _ask(self, question: Callable[[], T]) -> T:
        self.counts["questions"] += 1
        return super()._ask(question)


class Rank:
    """One simulated rank: a watchdog over an operation that never ends."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.ended = threading.Event()
        self.report: str | None = None
        self.seconds = 0.0
        self.start = float("inf")  # until all ranks are ready
        self.dog = Watchdog(
            store,
            rank=rank,
            size=size,
            now=lambda: ("forward-backward of step 7", self.start),
            limit_seconds=HEALTHY_SECONDS,
            end=self.end,
        )
        self.board = self.dog.board = CountingBoard(store, rank)

    def end(self, report: str | None) -> None:
        """Note the report and when it came, and end the thread, as the process would end."""
        self.report, self.seconds = report, time.perf_counter() - self.start - HEALTHY_SECONDS
        self.dog.stop.set()
        self.dog.is_over.set()
        self.ended.set()


def serve(port: "Queue[int]", cpu: "Queue[float]") -> None:
    """Host the store, and tell the CPU seconds that it takes in each second."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
    port.put(store.port)
    while True:
        before = time.process_time()
        time.sleep(1)
        cpu.put(time.process_time() - before)


def simulate(port: int, ranks: Sequence[int], *, size: int, lost: int, ready: Any, results: "Queue[Any]") -> None:
    """Run some of the ranks; the lost one publishes a single heartbeat."""
    store = SharedConnection(dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=120)))
    simulated = {}
    for rank in ranks:
        simulated[rank] = Rank(store, rank, size)
        simulated[rank].dog._tell_position()
        if rank != lost:
            simulated[rank].dog.__enter__()
    ready.wait()
    for each in simulated.values():
        each.start = time.perf_counter()
    for rank, each in simulated.items():
        if rank != lost:
            each.ended.wait(HEALTHY_SECONDS + 60)
            results.put((rank, each.ended.is_set(), each.report, each.seconds, dict(each.board.counts)))


def seconds_of_reads(port: int, size: int) -> tuple[float, float]:
    """Measure reading all heartbeats by one client: one by one, with a check each, and by `Board.read`."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=120))
    start = time.perf_counter()
    for rank in range(size):
        if store.check([f"beat/{rank}"]):
            store.get(f"beat/{rank}")
    middle = time.perf_counter()
    Board(store, 0).read(range(size))
    return middle - start, time.perf_counter() - middle


def main() -> int:
    """Print the measurements; return 1 if the report or the reads are not as they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--lost", type=int, default=0, help="the rank that is lost; it does not host the store")
    args = parser.parse_args()
    context = multiprocessing.get_context("fork")
    port_queue, cpu, results = context.Queue(), context.Queue(), context.Queue()
    context.Process(target=serve, args=(port_queue, cpu), daemon=True).start()
    port = port_queue.get()
    ready = context.Barrier(args.processes + 1)
    for i in range(args.processes):
        ranks = range(i, args.ranks, args.processes)
        options = {"size": args.ranks, "lost": args.lost, "ready": ready, "results": results}
        context.Process(target=simulate, args=(port, ranks), kwargs=options, daemon=True).start()
    ready.wait()
    time.sleep(0.7 * HEALTHY_SECONDS)
    one_by_one, batched = seconds_of_reads(port, args.ranks)
    loads = [cpu.get() for _ in range(cpu.qsize())][-5:]
    answers = [results.get() for _ in range(args.ranks - 1)]
    reports = [(rank, report) for rank, _, report, _, _ in answers if report is not None]
    others = [counts["read"] for rank, _, _, _, counts in answers if [rank] != [each for each, _ in reports]]
    print(f"{args.ranks} ranks: the store takes {sum(loads) / len(loads):.2f} CPU seconds a second for heartbeats")
    print(f"reading all: {1e3 * one_by_one:.0f} ms one by one, {1e3 * batched:.0f} ms in batches")
    questions = sum(counts["questions"] for *_, counts in answers)
    read = sum(counts["read"] for *_, counts in answers)
    print(f"at the fault: {questions:,} questions, {read:,} heartbeats read; at most {max(others)} by the others")
    print(f"the last rank ends {max(seconds for _, _, _, seconds, _ in answers):.1f} s after the limit")
    print(f"reports: {reports}")
    is_right = len(reports) == 1 and f"rank {args.lost} " in reports[0][1] and all(ended for _, ended, *_ in answers)
    return int(not is_right or max(others) > MOST_READ)


if __name__ == "__main__":
    sys.exit(main())
