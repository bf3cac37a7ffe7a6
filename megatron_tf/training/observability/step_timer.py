"""What a run is doing: how long each part of a step takes, and where a run that hangs is."""

import time

PHASES = ("start", "data", "forward-backward", "optimizer", "report", "evaluation", "saving")


class StepTimer:
    """One phase follows another; the time of each adds up under its name until it is taken. It starts in "start".

    On a GPU a phase ends where the host waits for the device: the loss ends forward and backward, the gradients' norm
    the first half of the optimizer's step, whose last kernels count to the next phase.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since = self._lap_start = time.perf_counter()
        self._name = "start"
        self.detail = ""
        """What the phases are about, such as a step."""

    def enter(self, name: str) -> None:
        """End the present phase and start `name`, one of PHASES."""
        now = time.perf_counter()
        self._seconds[self._name] += now - self._since
        self._since = now
        self._name = name

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, or since the start, in the order of PHASES; of those that were
        entered. The present one continues."""
        self.enter(self._name)
        seconds = {name: part for name, part in self._seconds.items() if part > 0}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return seconds

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        now = time.perf_counter()
        seconds = now - self._lap_start
        self._lap_start = now
        return seconds

    def now(self) -> tuple[str, float]:
        """(the present phase with its detail, since when by time.perf_counter); for another thread too."""
        return f"{self._name} {self.detail}".strip(), self._since
