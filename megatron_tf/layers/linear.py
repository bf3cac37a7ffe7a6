"""Linear layers of the plain transformer, sharded by rows over tensor-parallel ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tf.layers.casting import CastingModule
from megatron_tf.layers.row_probe import RowProbe


class Weight(CastingModule):
    """A weight [rows, columns] sharded by rows; layers sharded over their inputs store it transposed."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def of_type(self, x: Tensor) -> Tensor:
        """Return this rank's rows in the dtype of x."""
        return self.cast("weight", x.dtype)


class MLP(nn.Module):
    """gelu(x U^T) W with U and W [H, D], or with a gate G [H, D] (silu(x G^T) * x U^T) W (SwiGLU, arXiv 2002.05202).

    Each rank holds some of the H hidden units. A `probe` reads their activations and W.
    """

    def __init__(self, hidden_size: int, hidden_units: int, *, is_gated: bool = False) -> None:
        super().__init__()
        self.gate = Weight(hidden_units, hidden_size) if is_gated else None
        self.up = Weight(hidden_units, hidden_size)
        self.down = Weight(hidden_units, hidden_size)
        self.probe: RowProbe | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to x [..., D] -> [..., D], this rank's partial sum."""
        units, down = self._activations(x), self.down.of_type(x)
        if self.probe is not None:
            self.probe.measure(units.flatten(0, -2), down)
        return units @ down

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """Compute the activation of each hidden unit, [..., H], for x [..., D]; single rank, no gradients."""
        return self._activations(x)

    def _activations(self, x: Tensor) -> Tensor:
        up = F.linear(x, self.up.of_type(x))
        if self.gate is None:
            return F.gelu(up)
        return F.silu(F.linear(x, self.gate.of_type(x))) * up
