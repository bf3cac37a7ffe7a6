"""Orthogonal mixtures of rows: each new row depends on a whole block of old ones, and no sum of squares changes."""

from collections.abc import Iterator

import torch
from torch import Tensor

_LARGEST = 128  # rows of a block, a power of two; changing it changes every rotation


def blocks(count: int) -> Iterator[range]:
    """Yield the blocks of `count` rows: as large as possible, each a power of two."""
    start = 0
    while start < count:
        size = min(_LARGEST, 1 << (count - start).bit_length() - 1)
        yield range(start, start + size)
        start += size


def rotated(rows: Tensor, signs: Tensor) -> Tensor:
    """Multiply one block of rows [n, D] by the orthogonal matrix H S / sqrt(n) -> [n, D], in float64.

    S are the `signs` [n] of the rows and H is the Hadamard matrix of Sylvester's construction. Only sums and
    differences are computed, in a fixed order, so every machine gets the same bits.
    """
    count, columns = rows.shape
    mixed = rows.double() * signs.double()[:, None]
    step = 1
    while step < count:
        first, second = mixed.view(-1, 2, step, columns).unbind(1)
        mixed = torch.stack((first + second, first - second), dim=1).view(count, columns)
        step *= 2
    return mixed / count**0.5
