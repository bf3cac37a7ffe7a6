"""What goes wrong in single steps: batches that are not finite, and losses that jump."""

import statistics
from collections import deque
from collections.abc import Mapping

_HISTORY = 100  # losses that a spike is told by
_LEAST_HISTORY = 32
_LEAST_DEVIATION = 0.005  # of the median: a loss that hardly moves makes no spike of every ripple
_SIGMA_OF_MAD = 1.4826  # of a normal distribution, from its median absolute deviation


class SpikeDetector:
    """Tells losses that lie far above the median of those before; these do not count for what comes after.

    After a restart it takes 32 steps until it tells any.
    """

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self.losses: deque[float] = deque(maxlen=_HISTORY)
        self.in_a_row = 0
        """Spikes up to the last loss."""

    def is_spike(self, loss: float) -> bool:
        """Take in the loss of a step."""
        if len(self.losses) >= _LEAST_HISTORY:
            median = statistics.median(self.losses)
            deviation = _SIGMA_OF_MAD * statistics.median(abs(x - median) for x in self.losses)
            if loss > median + self.sigmas * max(deviation, _LEAST_DEVIATION * median):
                self.in_a_row += 1
                if self.in_a_row < _HISTORY:  # a loss that stays up is no spike any more
                    return True
        self.in_a_row = 0
        self.losses.append(loss)
        return False


def name_unsound(unsound: Mapping[str, int]) -> str:
    """What was not finite, and where, for a line of the log."""
    names = [f"{name} (rank {rank})" for name, rank in list(unsound.items())[:3]]
    more = len(unsound) - len(names)
    return f"{', '.join(names)}{f' and {more} more' if more else ''}"
