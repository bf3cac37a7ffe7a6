"""Communication on entry to and exit from layers that are sharded over tensor-parallel ranks."""

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.parallel.collectives import all_gather, reduce_scatter, sum_backward, sum_forward


def enter_tensor_parallel(x: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Gather x [s, B, D] -> [S, B, D], whole on every rank; backward sums the ranks' partial gradients."""
    return all_gather(x, 0, group) if sequence_parallel else sum_backward(x, group)


def leave_tensor_parallel(x: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Sum the ranks' partial x [S, B, D] -> this rank's [s, B, D] under sequence parallelism, otherwise [S, B, D]."""
    return reduce_scatter(x, 0, group) if sequence_parallel else sum_forward(x, group)
