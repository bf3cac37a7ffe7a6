"""A probe that measures how much each parameter token adds to the output of its module."""

import torch
from torch import Tensor

from megatron_tf.tokenformer.dtypes import wide_dtype

MOST_ROWS = 256
"""A probe reads at most this many rows of the input: enough for norms, and cheap next to the module's products."""


class RowProbe:
    """Measures the norm of P_j V_j for each of a rank's n tokens, in the first forward that it sees.

    Later micro-batches, and the same one when it is recomputed, change nothing.
    """

    def __init__(self) -> None:
        self.norms: Tensor | None = None
        """Norm over the rows read, [n]; None before the first forward."""
        self.num_rows = 0
        """Number of rows of the input that were read."""

    @torch.no_grad()
    def measure(self, weights: Tensor, values: Tensor) -> None:
        """Measure the outputs P V of weights P [T, n] and values V [n, E]."""
        if self.norms is not None:
            return
        # rows are positions times samples; an odd stride does not read the same sample each time
        stride = -(-len(weights) // MOST_ROWS) | 1
        wide = wide_dtype(weights.dtype)
        read = weights[::stride]
        self.num_rows = len(read)
        # P_j is a column and V_j a row: the norm of their product is that of their norms
        norms = torch.linalg.vector_norm(read, dim=0, dtype=wide)
        self.norms = norms * torch.linalg.vector_norm(values, dim=1, dtype=wide)
