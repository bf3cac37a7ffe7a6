"""Linear layers of the plain transformer, cut by rows over tensor-parallel ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tf.parallel.sharding import local_tensor


class Weight(nn.Module):
    """A [rows, columns] weight; its rows are what ranks share, so that a layer may hold it transposed."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def of_type(self, x: Tensor) -> Tensor:
        """This rank's rows in the type of x."""
        return local_tensor(self.weight).to(x.dtype)


class MLP(nn.Module):
    """gelu(x U^T) W with U, W [H, D]: each rank holds some of the H hidden units."""

    def __init__(self, hidden_size: int, hidden_units: int) -> None:
        super().__init__()
        self.up = Weight(hidden_units, hidden_size)
        self.down = Weight(hidden_units, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], this rank's partial sum."""
        return F.gelu(F.linear(x, self.up.of_type(x))) @ self.down.of_type(x)
