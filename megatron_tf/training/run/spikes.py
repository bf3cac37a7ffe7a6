"""Telling a loss that jumps from one that is noisy."""

import itertools
import math
import statistics
from collections import deque

from megatron_tf.checkpoint.record import SpikeHistory

_HISTORY = 100  # losses that noise is measured by
_RECENT = 16  # those that tell where the loss is
_LEAST_HISTORY = 32
_LEAST_DEVIATION = 0.005  # of the loss: one that hardly moves makes no spike of every ripple
_SIGMA = 1.4826 / math.sqrt(2)  # of normal noise, from the median of the differences between neighbours


class SpikeDetector:
    """Tells losses that lie far above the last ones; these do not count for what comes after.

    The noise is taken from the differences of successive losses, so that a fast fall is no noise.
    A new one takes 32 steps until any is told; one with a `history` judges as the one it was taken from.
    """

    def __init__(self, sigmas: float, history: SpikeHistory | None = None) -> None:
        self.sigmas = sigmas
        self.losses: deque[float] = deque(history.losses if history else (), maxlen=_HISTORY)
        self.in_a_row: int = history.in_a_row if history else 0
        """Spikes up to the last loss."""

    def history(self) -> SpikeHistory:
        """What the next loss is judged by."""
        return SpikeHistory(tuple(self.losses), self.in_a_row)

    def restart(self) -> None:
        """Count spikes from none: the parameters are others now. What is known of the loss stays."""
        self.in_a_row = 0

    def is_spike(self, loss: float) -> bool:
        """Take in the loss of a step."""
        if self.in_a_row == _HISTORY:  # a loss that stays up is no spike any more
            self.losses.clear()
        if len(self.losses) >= _LEAST_HISTORY:
            losses = list(self.losses)
            level = statistics.median(losses[-_RECENT:])
            noise = _SIGMA * statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))
            if loss > level + self.sigmas * max(noise, _LEAST_DEVIATION * level):
                self.in_a_row += 1
                return True
        self.in_a_row = 0
        self.losses.append(loss)
        return False
