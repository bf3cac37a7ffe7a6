"""The layer norm before the output layer, with weight and bias; those inside the blocks have no parameters."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.parallel.collectives import sum_backward
from megatron_tf.parallel.sharding import local_tensor


class FinalNorm(nn.Module):
    """Layer norm with weight and bias, which every tensor-parallel rank holds whole.

    `sequence_group` is the group over which the sequence is sharded, if it is: each rank's gradient then covers
    its own part of the sequence, and the parts are summed.
    """

    def __init__(self, hidden_size: int, epsilon: float, sequence_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.epsilon = epsilon
        self.sequence_group = sequence_group
        self.normalise = Kernels().normalise

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        weight = sum_backward(local_tensor(self.weight), self.sequence_group)
        bias = sum_backward(local_tensor(self.bias), self.sequence_group)
        return self.normalise(x, weight.to(x.dtype), bias.to(x.dtype), epsilon=self.epsilon)
