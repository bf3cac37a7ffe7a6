"""Which rows of a logical tensor this rank holds.

Everything that is sharded, is sharded on dimension 0: parameter tokens and vocabulary over tensor-parallel
ranks, and each rank's rows again over data-parallel ranks. So a rank always holds one contiguous row range of
each logical tensor, and that range is all that the optimizer, checkpoints and tools need to know.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class RowShard:
    """Rows [start, stop) of the logical tensor `name`, as held by this rank."""

    name: str
    global_shape: tuple[int, ...]
    start: int
    stop: int
    tensor: Tensor
    """The local rows: [stop - start, *global_shape[1:]], sharing memory with the parameter."""
    is_writer: bool
    """Whether this rank's copy is the one that counts: true on one rank for each row of the tensor."""

    def with_tensor(self, tensor: Tensor) -> "RowShard":
        """The same rows of another tensor of the same shape, such as an optimizer moment."""
        return replace(self, tensor=tensor)


def local_tensor(parameter: Tensor) -> Tensor:
    """The rank's own rows of a parameter, with gradients flowing back to it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def split_rows(rows: int, parts: int, index: int) -> tuple[int, int]:
    """Range of part `index` when `rows` are cut into `parts` as `torch.chunk` cuts: the last may be short or empty."""
    size = -(-rows // parts)
    return min(rows, index * size), min(rows, (index + 1) * size)


def row_shard(name: str, parameter: Tensor, is_copy: bool = False) -> RowShard:
    """The rows of `parameter` this rank holds.

    Mesh dimensions named "tp" cut first and "dp", or "dp_shard", cuts what is left, whatever their order in the mesh.
    `is_copy` marks a parameter that another pipeline stage owns (a tied embedding's second copy).
    """
    start = 0
    stop = parameter.shape[0]
    is_writer = not is_copy
    local = parameter.detach()
    if isinstance(parameter, DTensor):
        local = local_tensor(parameter.detach())
        mesh = parameter.device_mesh
        names = mesh.mesh_dim_names or ()
        # each dimension cuts what those before it left; sorted() keeps "tp" (False) in front of "dp" (True)
        for dim in sorted(range(mesh.ndim), key=lambda d: names[d].startswith("dp")):
            # every rank along a dimension that copies has these rows: the first of them writes
            if not parameter.placements[dim].is_replicate():
                low, high = split_rows(stop - start, mesh.size(dim), mesh.get_local_rank(dim))
                start, stop = start + low, start + high
            else:
                is_writer = is_writer and mesh.get_local_rank(dim) == 0
    if local.shape[0] != stop - start:
        raise AssertionError(f"{name}: expected rows [{start}, {stop}), the rank holds {local.shape[0]}")
    shape = tuple(parameter.shape)
    return RowShard(name, shape, start=start, stop=stop, tensor=local, is_writer=is_writer)


@torch.no_grad()
def copy_rows(shard: RowShard, rows: Tensor) -> None:
    """Write `rows` [stop - start, ...] over the shard's memory."""
    shard.tensor.copy_(rows)
