"""`Sample`: the ids of a sample, and what its dataset knows about them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Sample(NamedTuple):
    """A sample of S + 1 ids: S inputs, each followed by its target."""

    ids: NDArray[np.integer]
    """[S + 1], in the type of the .bin file."""
    counts: NDArray[np.bool_] | None = None
    """Whether each id counts in the loss as a target, [S + 1]; None if all do."""
    document_lengths: Sequence[int] | None = None
    """Number of inputs of each document, S together; None where documents end with an end-of-document id."""


def lengths_of_inputs(extents: Sequence[tuple[int, int, int]]) -> list[int]:
    """Return the number of inputs of each (document, start, stop) of a sample, whose last id is only a target."""
    lengths = [stop - start for _, start, stop in extents]
    lengths[-1] -= 1
    return lengths if lengths[-1] else lengths[:-1]
