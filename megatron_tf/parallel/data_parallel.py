"""Data parallelism through FSDP2: parameters, gradients and optimizer state, sharded or replicated."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from megatron_tf.parallel.mesh import Mesh


def shard_over_replicas(module: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh) -> None:
    """Apply FSDP to each block, then to the rest of `module`, over the data-parallel ranks; does nothing for one.

    Rows are sharded over the ranks that share one copy of the parameters; gradients are then also reduced between the
    copies.

    Parameters stay gathered between forward and backward, since a pipeline runs many micro-batches over them.
    Gradients are averaged over the replicas, in the parameters' dtype, once per step. The divisor of the loss relies on
    that mean: if gradients were summed instead, each replica's would shrink with the number of replicas and underflow
    in fp16.
    """
    replicas = mesh.replicas()
    if replicas is None:
        return
    for block in blocks:
        fully_shard(block, mesh=replicas, reshard_after_forward=False)
    fully_shard(module, mesh=replicas, reshard_after_forward=False)


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Set whether the next backward is the step's last, which reduces gradients and frees the gathered parameters."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        module.set_reshard_after_backward(enabled)
        module.set_is_last_backward(enabled)
