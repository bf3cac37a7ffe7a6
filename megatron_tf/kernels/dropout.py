"""Counter-based dropout: whether an element is dropped is a function of its row's seed and its column.

SplitMix64 gives each seed a stream of 64-bit words that can be read at any index, without state. Integer arithmetic is
exact, so masks are the same on a CPU, on a GPU, and in a backward that draws them again.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

GENERATOR = "splitmix64"
"""Name of the generator in checkpoints; a different generator must have a different name."""

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31
# per chunk and thread on a CPU: 512 KiB, and as much for the shifted words, fit in its cache
_CACHED_WORDS = 1 << 16


class Drop(Protocol):
    """Dropout of a tensor, row by row."""

    def __call__(self, x: Tensor, seeds: Tensor, *, stream: int, rate: float, residual: Tensor | None = None) -> Tensor:
        """Drop a fraction `rate` of x [..., D] and scale up the rest, then add `residual` [..., D].

        Each row has a seed, int64 [...]. Word `stream` of that seed's stream is the seed of the mask, and each word of
        the mask's stream decides two columns.
        """


def drop(x: Tensor, seeds: Tensor, *, stream: int, rate: float, residual: Tensor | None = None) -> Tensor:
    """Compute `Drop` in PyTorch; autograd saves the mask for backward."""
    mask = dropped(nth_word(seeds, stream), x.shape[-1], rate)
    out = x.masked_fill(mask, 0.0) * scale(rate)
    return out if residual is None else residual + out


def scale(rate: float) -> float:
    """Return the factor that kept elements are multiplied by."""
    return 1.0 / (1.0 - rate)


def threshold(rate: float) -> int:
    """Return the bound below which a uniform signed 32-bit integer falls with probability `rate`."""
    return min(round(rate * 2**32), 2**32 - 1) - 2**31


def offset(index: int) -> int:
    """Return the signed 64-bit integer that, added to a seed and mixed, gives word `index` of its stream."""
    return _signed((index + 1) * _GAMMA)


def nth_word(seeds: Tensor, index: Tensor | int) -> Tensor:
    """Return word `index` of the SplitMix64 stream of each seed: int64, of the broadcast shape of both."""
    steps = offset(index) if isinstance(index, int) else (index + 1) * _signed(_GAMMA)
    return _mix(seeds + steps)


def dropped(seeds: Tensor, columns: int, rate: float) -> Tensor:
    """Return the mask of dropped elements, bool [..., columns], of rows with these seeds, int64 [...]."""
    mask = torch.empty(seeds.numel(), columns, dtype=torch.bool, device=seeds.device)
    # with an odd number of columns, half of the last word is unused
    steps = (torch.arange(-(-columns // 2), device=seeds.device) + 1) * _signed(_GAMMA)
    for rows in _row_chunks(mask):
        words = _mix(seeds.flatten()[rows, None] + steps)
        torch.lt(words.view(torch.int32)[:, :columns], threshold(rate), out=mask[rows])
    return mask.view(*seeds.shape, columns)


def _mix(words: Tensor) -> Tensor:
    """Mix the bits of int64 words in place, as SplitMix64 does."""
    shifted = torch.empty_like(words)
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, None), strict=True):
        torch.bitwise_right_shift(words, shift, out=shifted)
        # a signed shift fills with the sign, an unsigned one with zeros
        words.bitwise_xor_(shifted.bitwise_and_((1 << 64 - shift) - 1))
        if multiplier is not None:
            words.mul_(_signed(multiplier))
    return words


def _row_chunks(mask: Tensor) -> Iterator[slice]:
    """Yield slices of rows that fit in the CPU's cache; on other devices, one slice of all rows."""
    rows, columns = mask.shape
    size = rows if mask.device.type != "cpu" else 2 * _CACHED_WORDS * torch.get_num_threads() // max(columns, 1)
    size = max(size, 1)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def _signed(value: int) -> int:
    """Wrap an integer to signed 64 bits."""
    return (value + 2**63) % 2**64 - 2**63
