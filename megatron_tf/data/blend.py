"""Blends of several datasets, in proportion to their weights at every point of the run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data._index import BLEND_BLOCK, greedy_blend
from megatron_tf.data.sample import Sample

SPACED = "spaced"
"""Name of SpacedBlend in checkpoints; new runs use it."""
GREEDY = "greedy"
"""Name of GreedyBlend in checkpoints; runs started with version 0.1, whose checkpoints name no blend, use it."""

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_BLOCK_STEPS = 1024  # computed at once: the samples of a batch are consecutive
_FIRST_STEPS = 1 << 16  # initial capacity of the greedy index, which doubles from there


class Samples(Protocol):
    """An unbounded sequence of samples: sample i exists for every i >= 0."""

    @property
    def has_loss_mask(self) -> bool:
        """Whether some targets may be excluded from the loss by the data."""

    def __getitem__(self, sample: int) -> NDArray[np.integer]:
        """Return the ids of a sample, [seq_length + 1]."""

    def read(self, sample: int) -> Sample:
        """Return the ids of a sample, with what the dataset knows about them."""

    def prefetch(self, sample: int) -> None:
        """Ask the operating system to read a sample ahead, without waiting for it."""

    def place(self, sample: int, position: int) -> tuple[Path, int, int]:
        """Return the source of the token at `position` of a sample: (dataset, document, offset in the document)."""


class Blend(Protocol):
    """An order in which samples are taken from several datasets; one step takes one sample."""

    shares: NDArray[np.float64]
    """Fraction of the samples that comes from each dataset, [datasets]."""

    def locate(self, step: int) -> tuple[int, int]:
        """Return (dataset, sample number within it) of a step."""


class SpacedBlend:
    """Spaces the samples of each dataset evenly; any step can be computed directly from the weights.

    Sample k of dataset d with share w is due at time (k + 1 - phase) / w. The steps are all samples sorted by time,
    with ties sorted by dataset. Until time t a dataset has provided floor(w t + phase) samples, so after any step there
    is a t for which every dataset is less than one sample away from w t.

    The phase is the fractional part of (d + 1/2) times the golden ratio: with the same phase for all, many small
    datasets of equal weight would come in one burst.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = np.array(weights, dtype=np.float64) / math.fsum(weights)
        self._phases, _ = np.modf((np.arange(len(weights)) + 0.5) * _GOLDEN_RATIO)
        # the block computed last; -1 matches no step
        self._latest = (-1, *self.steps(0, 0))

    def locate(self, step: int) -> tuple[int, int]:
        """Return (dataset, sample number within it) of a step; blocks of steps are computed together."""
        block, place = divmod(step, _BLOCK_STEPS)
        latest = self._latest  # another thread may replace it
        if latest[0] != block:
            self._latest = latest = (block, *self.steps(block * _BLOCK_STEPS, _BLOCK_STEPS))
        _, which, samples = latest
        return int(which[place]), int(samples[place])

    def steps(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the dataset and the sample number of each step in [first, first + count), both int64 [count]."""
        _, which, samples, skipped = self._due(first, count)
        return which[skipped : skipped + count], samples[skipped : skipped + count]

    def counts(self, step: int) -> NDArray[np.int64]:
        """Return how many samples each dataset has provided before a step, int64 [datasets]."""
        before, which, _, skipped = self._due(step, 0)
        return before + np.bincount(which[:skipped], minlength=len(before)).astype(np.int64)

    def _due(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
        """Return some consecutive steps that include [first, first + count).

        They are (samples of each dataset before them [datasets], dataset of each step, its sample number, how many of
        the steps are before `first`).
        """
        datasets = len(self.shares)
        phases = float(self._phases.sum())
        # floor(w t + phase), summed over datasets, is between t + phases - datasets and t + phases, which gives two
        # times that are certain to enclose the steps. Rounding can put one sample of each dataset on the wrong side of
        # either, hence the slack of that many steps; its last term bounds the rounding of the sum of shares.
        slack = datasets + 1 + (first + count) * datasets * 2.0**-50
        before = self._counts(first - phases - slack)
        after = self._counts(first + count - phases + datasets + slack)

        # all samples due in between, ordered by dataset and number, so that a stable sort breaks ties by dataset
        due = after - before
        which = np.repeat(np.arange(datasets), due)
        samples = np.arange(len(which)) + np.repeat(before - (np.cumsum(due) - due), due)
        order = np.argsort(self._times(which, samples), kind="stable")

        skipped = first - int(before.sum())
        assert 0 <= skipped <= len(order) - count
        return before, which[order], samples[order], skipped

    def _counts(self, time: float) -> NDArray[np.int64]:
        """Return how many samples of each dataset are due by `time`, up to one that is due at just that time."""
        return np.maximum(np.floor(self.shares * time + self._phases), 0).astype(np.int64)

    def _times(self, which: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the times at which samples are due. The order of the steps depends on every bit of this expression."""
        times: NDArray[np.float64] = (samples + 1 - self._phases[which]) / self.shares[which]
        return times


class GreedyBlend:
    """Takes the dataset that is furthest behind its share at each step, as Megatron-LM does; ties go to the first one.

    Needs an index of all steps so far, which grows in memory as they are read. With `are_shares` the weights already
    sum to 1 and are used without normalizing them again, since their last bit can decide ties.
    """

    def __init__(self, weights: Sequence[float], are_shares: bool = False) -> None:
        self._weights = np.array(weights, dtype=np.float64)
        self._are_shares = are_shares
        self.shares = self._weights / self._weights.sum()
        self._grow(_FIRST_STEPS)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (dataset, sample number within it) of a step; the index grows to include it."""
        while step >= len(self._which):
            self._grow(2 * len(self._which))
        which = int(self._which[step])
        block = step // BLEND_BLOCK
        # storing the sample number of each step would take five times the memory: count within a block instead
        within_block = int(np.count_nonzero(self._which[block * BLEND_BLOCK : step] == which))
        return which, int(self._taken[block, which]) + within_block

    def _grow(self, steps: int) -> None:
        # each choice depends on all before it, so start over; doubling the size bounds this to twice the work
        self._which, self._taken = greedy_blend(self._weights, steps, self._are_shares)


class BlendedDataset:
    """A dataset whose sample i is step i of a blend. The order does not depend on the length of the run."""

    def __init__(self, datasets: Sequence[Samples], blend: Blend) -> None:
        self.datasets = datasets
        self.blend = blend
        self.has_loss_mask = any(dataset.has_loss_mask for dataset in datasets)

    def __getitem__(self, step: int) -> NDArray[np.integer]:
        dataset, sample = self._locate(step)
        return dataset[sample]

    def read(self, step: int) -> Sample:
        """Return the sample of a step."""
        dataset, sample = self._locate(step)
        return dataset.read(sample)

    def prefetch(self, step: int) -> None:
        """Ask the operating system to read the sample of a step ahead."""
        dataset, sample = self._locate(step)
        dataset.prefetch(sample)

    def place(self, step: int, position: int) -> tuple[Path, int, int]:
        """Return (dataset, document, offset in the document) of a token of the step's sample."""
        dataset, sample = self._locate(step)
        return dataset.place(sample, position)

    def _locate(self, step: int) -> tuple[Samples, int]:
        which, sample = self.blend.locate(step)
        return self.datasets[which], sample
