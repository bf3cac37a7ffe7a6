"""Initial values as a function of a parameter's name, the seed and the row, independent of the parallel layout."""

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
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
    # repr distinguishes keys that differ only in type or in where an element ends; generators take 63 bits
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal_rows(name: str, *, seed: int, start: int, stop: int, columns: int, std: float) -> Tensor:
    """Draw rows [start, stop) of the N(0, std^2) tensor called `name`: fp32 [stop - start, columns] on the CPU.

    Each block of rows has its own generator, so that drawing a range costs only that range, and a tensor that grows
    keeps the values of its old rows.
    """
    # whatever torch's default dtype and device are
    rows = torch.empty(stop - start, columns, dtype=torch.float32, device="cpu")

    def draw(block: int) -> None:
        generator = torch.Generator("cpu").manual_seed(stream_seed(seed, name, block))
        # always a whole block: a row's values depend on the rows drawn before it
        values = torch.empty(_BLOCK_ROWS, columns, dtype=torch.float32, device="cpu")
        values.normal_(0.0, std, generator=generator)
        first = block * _BLOCK_ROWS
        low, high = max(start, first), min(stop, first + _BLOCK_ROWS)
        rows[low - start : high - start] = values[low - first : high - first]

    # torch draws on one core for each generator, and lets other threads run meanwhile
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS))))
    return rows


def value_token_std(num_layers: int, hidden_size: int) -> float:
    """Return the initial standard deviation of value tokens ("wang"): 2 / (L sqrt(D))."""
    return 2.0 / (num_layers * math.sqrt(hidden_size))
