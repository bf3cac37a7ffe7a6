"""Initial values: a function of a parameter's name, the seed and the row, never of the parallel layout."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ROWS = 64  # rows drawn from one generator; changing it changes every initial value


@dataclass(frozen=True)
class Initial:
    """How a parameter is initialized: N(0, std^2), or the constant where `std` is 0."""

    constant: float = 0.0
    std: float = 0.0


def stream_seed(seed: int, *key: object) -> int:
    """Derive a 63-bit seed for the stream named by `key` under the run's `seed`."""
    # repr keeps keys apart that only differ in type or in where one ends; generators take 63 bits
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal_rows(name: str, *, seed: int, start: int, stop: int, columns: int, std: float) -> Tensor:
    """Draw rows [start, stop) of the N(0, std^2) tensor called `name`: fp32 [stop - start, columns] on the CPU.

    Rows come in blocks, each with a generator of its own, so that any range costs only its own rows, and a
    tensor that grows keeps the values of its old rows.
    """
    rows = torch.empty(stop - start, columns)
    for block in range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)):
        generator = torch.Generator().manual_seed(stream_seed(seed, name, block))
        # a whole block even for a part of it: a row is what the generator gives after those before it
        values = torch.empty(_BLOCK_ROWS, columns).normal_(0.0, std, generator=generator)
        first = block * _BLOCK_ROWS
        low, high = max(start, first), min(stop, first + _BLOCK_ROWS)
        rows[low - start : high - start] = values[low - first : high - first]
    return rows


def value_token_std(num_layers: int, hidden_size: int) -> float:
    """Return the initial standard deviation of value tokens ("wang"): 2 / (L sqrt(D))."""
    return 2.0 / (num_layers * math.sqrt(hidden_size))
