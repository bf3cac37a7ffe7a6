"""What ranks tell each other through the store of a run: heartbeats, an alarm, and who reports a fault."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from threading import Thread
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

ALARM = "fault/alarm"
REPORT = "fault/report"
_READ = "fault/read"
_BATCH = 256  # heartbeats in one answer, about 100 KB
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Heartbeat:
    """The status that a rank publishes about once a second."""

    host: str
    process: int
    count: int
    """The number of heartbeats so far."""
    operation: str
    seconds: float
    """Seconds since the operation started."""
    place: str
    """The innermost line of the main thread."""
    is_waiting: bool
    """Whether that line waits for other ranks."""
    has_left: bool = False
    """Whether this is the last one, of a rank that exits because of a fault that another rank reports."""
    has_ended: bool = False
    """Whether this is the last one, of a rank whose operation failed."""


class Board:
    """The part of the store in which a rank publishes its heartbeats and reads those of others.

    Reading raises RuntimeError if the host of the store is gone, or does not answer within 10 seconds: torch itself
    waits for a frozen host without a limit.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        # a connection of its own, as a store serves one thread at a time
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self.rank = rank
        self.is_lost = False
        """Whether the host of the store no longer answers."""

    def publish(self, beat: Heartbeat) -> None:
        """Publish this rank's heartbeat. Raises RuntimeError if the host of the store is gone."""
        if not self.is_lost:
            self.store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def read(self, ranks: Sequence[int]) -> dict[int, Heartbeat | None]:
        """Return the newest heartbeat of each of these ranks; None for ranks that have published none."""
        beats: dict[int, Heartbeat | None] = {}
        for start in range(0, len(ranks), _BATCH):
            beats |= self._read_batch(ranks[start : start + _BATCH])
        return beats

    def _read_batch(self, ranks: Sequence[int]) -> dict[int, Heartbeat | None]:
        """Read them in one answer, or in halves if some are missing, as a store would wait for them."""
        if not ranks:
            return {}
        keys = [f"beat/{rank}" for rank in ranks]
        if self._ask(lambda: self.store.check(keys)):
            texts = self._ask(lambda: self.store.multi_get(keys))
            return {rank: Heartbeat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}
        if len(ranks) == 1:
            return {ranks[0]: None}
        middle = len(ranks) // 2
        return self._read_batch(ranks[:middle]) | self._read_batch(ranks[middle:])

    def listener(self) -> Callable[[str], bool]:
        """Return a function that returns whether ALARM or REPORT is set, for a thread of its own.

        It raises RuntimeError if the host of the store is gone, and blocks if that is frozen.
        """
        store: dist.Store = self.store.clone()  # type: ignore[attr-defined]
        return lambda key: bool(store.check([key]))

    def raise_alarm(self, symptom: str) -> None:
        """Let all ranks diagnose a fault; only the first symptom is kept."""
        self._ask(lambda: self.store.compare_set(ALARM, "", symptom))

    def symptom(self) -> str:
        """Return the symptom of an alarm that was raised."""
        return self._ask(lambda: self.store.get(ALARM)).decode()

    def claim_report(self) -> bool:
        """Return whether this rank reports the fault: true on the first rank that calls this."""
        return self._ask(lambda: self.store.compare_set(REPORT, "", str(self.rank))).decode() == str(self.rank)

    def confirm_report(self) -> None:
        """Count this rank among those that know that the fault is reported."""
        self._ask(lambda: self.store.add(_READ, 1))

    def num_confirmed(self) -> int:
        """Return how many ranks know that the fault is reported."""
        return self._ask(lambda: self.store.add(_READ, 0))

    def _ask(self, question: Callable[[], T]) -> T:
        """Return the answer of the store, asked in a thread that is left behind if there is none."""
        if self.is_lost:
            raise RuntimeError("the host of the store does not answer")
        answers: list[T | Exception] = []

        def ask() -> None:
            try:
                answers.append(question())
            except Exception as error:  # raised again in the thread that asks
                answers.append(error)

        thread = Thread(target=ask, daemon=True, name="store")
        thread.start()
        thread.join(_ANSWER_SECONDS)
        answer = answers[0] if answers else RuntimeError(f"no answer within {_ANSWER_SECONDS:.0f} s")
        if isinstance(answer, Exception):
            self.is_lost = True
            raise answer
        return answer
