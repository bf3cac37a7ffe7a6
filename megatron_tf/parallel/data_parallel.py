"""Data parallelism: parameters, gradients and optimizer states sharded over replicas, or copied, through FSDP2."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from megatron_tf.parallel.mesh import Mesh


def shard_over_replicas(module: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh) -> None:
    """Spread each block, then what is left of `module`, over the mesh's replicas; nothing to do for one.

    Rows are sharded over the replicas that share a copy; gradients then also go between the copies.

    Parameters stay gathered between forward and backward: a pipeline runs many micro-batches over them.
    Gradients are averaged over the replicas, in fp32, once a step. The loss's divisor counts on that mean: without it
    each replica's gradients would be smaller the more replicas there are, and those in fp16 would vanish.
    """
    replicas = mesh.replicas()
    if replicas is None:
        return
    for block in blocks:
        fully_shard(block, mesh=replicas, reshard_after_forward=False)
    fully_shard(module, mesh=replicas, reshard_after_forward=False)


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward is a step's last, which communicates gradients and lets go of what was gathered."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        module.set_reshard_after_backward(enabled)
        module.set_is_last_backward(enabled)
