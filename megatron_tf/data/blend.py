"""Several datasets as one, in proportion to their weights at every prefix of the run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data._index import BLEND_BLOCK, greedy_blend

SPACED = "spaced"
"""Name of SpacedBlend in a checkpoint: the blend of new runs."""
GREEDY = "greedy"
"""Name of GreedyBlend in a checkpoint: the blend of runs begun by version 0.1, whose checkpoints name none."""

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_BLOCK_STEPS = 1024  # computed at a time: the samples of a batch are neighbors
_FIRST_STEPS = 1 << 16  # steps the greedy index grows to at first; it doubles from there


class Samples(Protocol):
    """Anything that gives sample i for every i >= 0."""

    def __getitem__(self, sample: int) -> NDArray[np.integer]:
        """Ids [seq_length + 1]."""

    def prefetch(self, sample: int) -> None:
        """Have the system read a sample, without waiting for it."""

    def place(self, sample: int, position: int) -> tuple[Path, int, int]:
        """(dataset, document, offset in it) of a token of a sample."""


class Blend(Protocol):
    """An order in which datasets are read."""

    shares: NDArray[np.float64]
    """Part of each dataset in the whole, [datasets]."""

    def locate(self, step: int) -> tuple[int, int]:
        """(dataset, which of its samples) of a step."""


class SpacedBlend:
    """Spaces the samples of each dataset evenly; any step is computed from the weights alone.

    Sample k of dataset d, of share w, is due at time (k + 1 - phase) / w. Steps are all samples by time, ties by
    dataset. At time t a dataset has given floor(w t + phase) samples, so after any step there is a t for which every
    dataset is less than one sample away from w t.

    The phase is the fractional part of (d + 1/2) times the golden ratio: with one phase for all, many small datasets
    of the same weight would come in one burst.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = np.array(weights, dtype=np.float64) / math.fsum(weights)
        self._phases, _ = np.modf((np.arange(len(weights)) + 0.5) * _GOLDEN_RATIO)
        # no step is in block -1
        self._latest = (-1, *self.steps(0, 0))

    def locate(self, step: int) -> tuple[int, int]:
        """See Blend."""
        block, place = divmod(step, _BLOCK_STEPS)
        latest = self._latest  # another thread may replace it
        if latest[0] != block:
            self._latest = latest = (block, *self.steps(block * _BLOCK_STEPS, _BLOCK_STEPS))
        _, which, samples = latest
        return int(which[place]), int(samples[place])

    def steps(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the dataset, and which of its samples, of steps [first, first + count); both int64 [count]."""
        datasets = len(self.shares)
        phases = float(self._phases.sum())
        # floor(w t + phase), summed over datasets, is at most t + phases, and less than one a dataset below that:
        # two times that surely enclose the steps. Rounding can put one sample of each dataset on the wrong side of
        # such a time, so both leave as many steps between; the last term is what it does to the sum of shares.
        slack = datasets + 1 + (first + count) * datasets * 2.0**-50
        before = self._counts(first - phases - slack)
        after = self._counts(first + count - phases + datasets + slack)

        # all samples due in between, by dataset and then by number, so that a stable sort breaks ties by dataset
        due = after - before
        which = np.repeat(np.arange(datasets), due)
        samples = np.arange(len(which)) + np.repeat(before - (np.cumsum(due) - due), due)
        order = np.argsort(self._times(which, samples), kind="stable")

        skipped = first - int(before.sum())
        assert 0 <= skipped <= len(order) - count
        chosen = order[skipped : skipped + count]
        return which[chosen], samples[chosen]

    def _counts(self, time: float) -> NDArray[np.int64]:
        """How many samples of each dataset are due at `time` or earlier, give or take one that is due just then."""
        return np.maximum(np.floor(self.shares * time + self._phases), 0).astype(np.int64)

    def _times(self, which: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """When samples are due: the order of steps follows from this expression to the bit."""
        times: NDArray[np.float64] = (samples + 1 - self._phases[which]) / self.shares[which]
        return times


class GreedyBlend:
    """Takes the dataset furthest behind its share at each step, as Megatron-LM does; ties go to the first.

    Needs an index of all steps so far, which grows in memory as they are read. `are_shares`: the weights add up to 1
    and are taken to the last bit, which decides between datasets that are due alike.
    """

    def __init__(self, weights: Sequence[float], are_shares: bool = False) -> None:
        self._weights = np.array(weights, dtype=np.float64)
        self._are_shares = are_shares
        self.shares = self._weights / self._weights.sum()
        self._grow(_FIRST_STEPS)

    def locate(self, step: int) -> tuple[int, int]:
        """See Blend."""
        while step >= len(self._which):
            self._grow(2 * len(self._which))
        which = int(self._which[step])
        block = step // BLEND_BLOCK
        # a number for each step would take five times the memory: so it is counted, within a block alone
        within_block = int(np.count_nonzero(self._which[block * BLEND_BLOCK : step] == which))
        return which, int(self._taken[block, which]) + within_block

    def _grow(self, steps: int) -> None:
        # from the first step each time, since a choice depends on all before it; doubling keeps that to twice the work
        self._which, self._taken = greedy_blend(self._weights, steps, self._are_shares)


class BlendedDataset:
    """`dataset[i]` is step i of a blend. The order of a prefix does not depend on how far the run goes."""

    def __init__(self, datasets: Sequence[Samples], blend: Blend) -> None:
        self.datasets = datasets
        self.blend = blend

    def __getitem__(self, step: int) -> NDArray[np.integer]:
        dataset, sample = self._locate(step)
        return dataset[sample]

    def prefetch(self, step: int) -> None:
        """See Samples."""
        dataset, sample = self._locate(step)
        dataset.prefetch(sample)

    def place(self, step: int, position: int) -> tuple[Path, int, int]:
        """See Samples."""
        dataset, sample = self._locate(step)
        return dataset.place(sample, position)

    def _locate(self, step: int) -> tuple[Samples, int]:
        which, sample = self.blend.locate(step)
        return self.datasets[which], sample
