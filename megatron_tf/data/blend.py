"""Several data sets as one, in proportion to their weights at every prefix of the run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tf._index import BLEND_BLOCK, blend

_FIRST_STEPS = 1 << 16  # steps the index grows to at first; it doubles from there


class Samples(Protocol):
    """Anything that gives sample i for every i >= 0."""

    def __getitem__(self, sample: int) -> NDArray[np.integer]:
        """Ids [seq_length + 1]."""

    def prefetch(self, sample: int) -> None:
        """Have the system read a sample, without waiting for it."""

    def place(self, sample: int, position: int) -> tuple[Path, int, int]:
        """(data set, document, offset in it) of a token of a sample."""


class BlendedDataset:
    """`dataset[i]` is step i of the blend. The order of a prefix does not depend on how far the run goes.

    `are_shares`: the weights add up to 1 and are taken to the last bit, which decides between sets that are due alike.
    """

    def __init__(self, datasets: Sequence[Samples], weights: Sequence[float], are_shares: bool = False) -> None:
        self.datasets = datasets
        self.weights, self.are_shares = np.array(weights, dtype=np.float64), are_shares
        self._grow(_FIRST_STEPS)

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
        while step >= len(self.which):
            self._grow(2 * len(self.which))
        which, block = int(self.which[step]), step // BLEND_BLOCK
        within_block = int(np.count_nonzero(self.which[block * BLEND_BLOCK : step] == which))
        return self.datasets[which], int(self.taken[block, which]) + within_block

    def _grow(self, steps: int) -> None:
        self.which, self.taken = blend(self.weights, steps, self.are_shares)
