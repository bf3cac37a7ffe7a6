"""Times of the phases of a step, and the current phase of a run that hangs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("start", "data", "forward-backward", "optimizer", "report", "evaluation", "saving")


class StepTimer:
    """Accumulates the time of consecutive phases by name until `take` is called. The first phase is "start".

    On a GPU, a phase ends where the host waits for the device: forward and backward end with the loss; the optimizer's
    step waits for the gradient norm, and its last kernels count towards the next phase.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._waits = dict.fromkeys(PHASES, 0.0)
        self._since = self._lap_start = time.perf_counter()
        self._name = "start"
        self.detail = ""
        """What the phases belong to, such as a step number."""

    def enter(self, name: str) -> None:
        """End the current phase and start `name`, one of PHASES."""
        now = time.perf_counter()
        self._seconds[self._name] += now - self._since
        self._since = now
        self._name = name

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this context as waiting for other ranks, as a part of the current phase."""
        start = time.perf_counter()
        yield
        self._waits[self._name] += time.perf_counter() - start

    def take_waits(self) -> dict[str, float]:
        """Return the seconds in `waiting` since the last call, by phase; the phases that only compute have none.

        The collectives of forward, backward and update are not among them.
        """
        waits = self._waits
        self._waits = dict.fromkeys(PHASES, 0.0)
        return waits

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase entered since the last call, or since the start, in the order of PHASES.

        The current phase continues.
        """
        self.enter(self._name)
        seconds = {name: part for name, part in self._seconds.items() if part > 0}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return seconds

    def lap(self) -> float:
        """Return the seconds since the last call, or since the start."""
        now = time.perf_counter()
        seconds = now - self._lap_start
        self._lap_start = now
        return seconds

    def now(self) -> tuple[str, float]:
        """Return the current phase with its detail, and when it started by time.perf_counter. Thread-safe."""
        return f"{self._name} {self.detail}".strip(), self._since
