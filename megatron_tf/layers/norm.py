"""Norms over the last dimension: layer norms, and RMSNorms (arXiv 1910.07467), which only divide by a root mean square.

Weights and biases are replicated on every tensor-parallel rank. Where the inputs of a norm are split over ranks, each
rank's gradient covers its own part, and backward sums them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.parallel.collectives import sum_backward
from megatron_tf.tokenformer.dtypes import wide_dtype


class BlockNorm(nn.Module):
    """Layer norm inside the blocks, without parameters."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.normalize = Kernels().normalize

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., D] over D."""
        return self.normalize(x, None, None, epsilon=self.epsilon)


class FinalNorm(nn.Module):
    """Layer norm with weight and bias before the output layer.

    `sequence_group` is the group over which the sequence is sharded, if any.
    """

    def __init__(self, hidden_size: int, epsilon: float, sequence_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.epsilon = epsilon
        self.sequence_group = sequence_group
        self.normalize = Kernels().normalize

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., D] over D."""
        weight = sum_backward(self.weight, self.sequence_group)
        bias = sum_backward(self.bias, self.sequence_group)
        return self.normalize(x, weight.to(x.dtype), bias.to(x.dtype), epsilon=self.epsilon)


class RMSNorm(nn.Module):
    """RMSNorm with a weight: w x / sqrt(mean(x^2) + epsilon), with statistics in at least fp32.

    `split_group` is the group over which the inputs are split, if any: the sequence, or the heads.
    """

    def __init__(self, size: int, epsilon: float, split_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon
        self.split_group = split_group

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., size] over its last dimension."""
        wide = self.weight.to(wide_dtype(self.weight.dtype))  # data-parallel ranks gather 16 bits
        weight = sum_backward(wide, self.split_group)
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.epsilon)
