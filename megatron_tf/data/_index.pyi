from typing import Any

import numpy as np
from numpy.typing import NDArray

def permutation(n: int, key0: int, key1: int) -> NDArray[np.integer]: ...
def sample_index(
    order: NDArray[np.integer], lengths: NDArray[np.integer], seq_length: int
) -> tuple[NDArray[np.integer], NDArray[np.integer]]: ...

BLEND_BLOCK: int

def greedy_blend(
    weights: NDArray[np.float64], size: int, are_shares: bool = False
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]: ...
def check_index(file: Any, type_sizes: bytes) -> tuple[int, int, int, int, bool]: ...
