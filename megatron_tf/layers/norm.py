"""Layer norm: without parameters inside the blocks, with weight and bias before the output layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.parallel.collectives import sum_backward
from megatron_tf.parallel.sharding import local_tensor


def layer_norm(x: Tensor, epsilon: float) -> Tensor:
    """x [..., D] with mean 0 and variance 1 over D; nothing learned."""
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


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

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        weight = sum_backward(local_tensor(self.weight), self.sequence_group)
        bias = sum_backward(local_tensor(self.bias), self.sequence_group)
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), self.epsilon)
