"""What a run is doing: how long each part of a step takes, and where it is should it come to a stand."""

import time


class Phases:
    """One phase follows another; the time of each adds up under its name until it is taken.

    On a GPU a phase ends where the host waits for the device: the loss ends forward and backward, the gradients' norm
    the first half of the optimizer's step, whose last kernels count to the next phase.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        self._name = "start"
        self.detail = ""
        """What the phases are about, such as a step."""

    def enter(self, name: str) -> None:
        """End the present phase."""
        now = time.perf_counter()
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._since, self._name = now, name

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; the present one goes on."""
        self.enter(self._name)
        seconds, self._seconds = self._seconds, {}
        return seconds

    def now(self) -> tuple[str, float]:
        """(the present phase with its detail, since when by time.perf_counter); for another thread too."""
        return f"{self._name} {self.detail}".strip(), self._since
