"""How activations enter and leave the layers whose parameters are sharded over tensor-parallel ranks."""

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.parallel.collectives import all_gather, reduce_scatter, sum_backward, sum_forward


def enter_tensor_parallel(x: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """[s, B, D] -> [S, B, D], whole on every rank; gradients, partial on each rank, are summed on the way back."""
    return all_gather(x, 0, group) if sequence_parallel else sum_backward(x, group)


def leave_tensor_parallel(x: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Partial sums [S, B, D] -> their sum: this rank's [s, B, D] of it under sequence parallelism, or all of it."""
    return reduce_scatter(x, 0, group) if sequence_parallel else sum_forward(x, group)
