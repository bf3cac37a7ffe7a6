"""Detection of loss spikes amid the noise of the loss."""

import itertools
import math
import statistics
from collections import deque

from megatron_tf.checkpoint.run_state import SpikeHistory

_HISTORY = 100  # losses from which noise is estimated
_RECENT = 16  # losses from which the current level is estimated
_MIN_HISTORY = 32
_MIN_DEVIATION = 0.005  # relative to the loss, so that small ripples of a flat loss are not spikes
_SIGMA = 1.4826 / math.sqrt(2)  # standard deviation of normal noise / median absolute difference of neighbors


class SpikeDetector:
    """Detects losses far above the recent ones; spikes are excluded from the statistics.

    Noise is estimated from the differences of successive losses, so that a steep decrease does not count as noise. A
    new detector reports nothing in its first 32 steps; one with a `history` continues where that was saved.
    """

    def __init__(self, sigmas: float, history: SpikeHistory | None = None) -> None:
        self.sigmas = sigmas
        self.losses: deque[float] = deque(history.losses if history else (), maxlen=_HISTORY)
        self.in_a_row: int = history.in_a_row if history else 0
        """Consecutive spikes up to the last loss."""

    def history(self) -> SpikeHistory:
        """Return the state by which the next loss is judged."""
        return SpikeHistory(tuple(self.losses), self.in_a_row)

    def restart(self) -> None:
        """Reset the count of consecutive spikes, since the parameters have changed, but keep the loss statistics."""
        self.in_a_row = 0

    def is_spike(self, loss: float) -> bool:
        """Record the loss of a step and return whether it is a spike."""
        if self.in_a_row == _HISTORY:  # a loss that stays high is no longer a spike
            self.losses.clear()
        if len(self.losses) >= _MIN_HISTORY:
            losses = list(self.losses)
            level = statistics.median(losses[-_RECENT:])
            noise = _SIGMA * statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))
            if loss > level + self.sigmas * max(noise, _MIN_DEVIATION * level):
                self.in_a_row += 1
                return True
        self.in_a_row = 0
        self.losses.append(loss)
        return False
