"""Data parallelism through FSDP2: parameters, gradients and optimizer state, sharded or replicated."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.dtypes import wide_dtype


def shard_over_replicas(
    module: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, *, dtype: torch.dtype, reshard_after_forward: bool
) -> None:
    """Apply FSDP to each block, then to the rest of `module`, over data- and context-parallel ranks, unless it is one.

    To parameters, context-parallel ranks are what data-parallel ones are: each computes gradients from its own tokens.
    So they share parameters and optimizer state too, by the same collectives.

    Rows are sharded over the ranks that share one copy of the parameters; gradients are then also reduced between the
    copies.

    The parameters of blocks are gathered in `dtype`, that of the activations. The others keep their own: a tied
    embedding is used twice, and its two gradients would be added up in 16 bits.

    Without `reshard_after_forward`, parameters stay gathered between forward and backward, since a pipeline runs many
    micro-batches over them. Gradients are averaged over the replicas, in fp32 or fp64. The divisor of the loss relies
    on that mean: if gradients were summed instead, each replica's would shrink with the number of replicas and
    underflow in fp16.
    """
    if mesh.group("dp_cp") is None:
        return
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide_dtype(dtype), cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh.sharing, reshard_after_forward=reshard_after_forward, mp_policy=precision)
    fully_shard(module, mesh=mesh.sharing, reshard_after_forward=False)


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Set whether the next backward is the step's last, which reduces gradients and frees the gathered parameters."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        module.set_reshard_after_backward(enabled)
        module.set_is_last_backward(enabled)


class EachMicroBatch(nn.Module):
    """Hides from a stage of torch.distributed.pipelining that its module is sharded.

    The stage would keep parameters and gradients gathered over all micro-batches. FSDP itself, as it is by default,
    frees parameters after each use and reduces the gradients of each micro-batch.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call the module."""
        return self.module(*args, **options)
