"""The rows of a logical tensor that this rank holds.

All sharding is on dimension 0: parameter tokens and vocabulary over tensor-parallel ranks, and each rank's rows again
over data-parallel ranks. A rank therefore holds one contiguous range of rows of each logical tensor, and that range is
all that the optimizer, checkpoints and tools need to know.
"""

from collections.abc import Sequence
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
    """Whether this rank saves these rows and counts them in norms: true on exactly one rank for each row."""

    def with_tensor(self, tensor: Tensor) -> "RowShard":
        """Return the same rows of another tensor of the same shape, such as an Adam moment."""
        return replace(self, tensor=tensor)


def local_tensor(parameter: Tensor) -> Tensor:
    """Return this rank's rows of a parameter, differentiably."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def split_rows(rows: int, parts: int, index: int) -> tuple[int, int]:
    """Return the range of part `index` of `rows` split as by `torch.chunk`: the last parts may be short or empty."""
    size = -(-rows // parts)
    return min(rows, index * size), min(rows, (index + 1) * size)


def row_shard(name: str, parameter: Tensor, is_copy: bool = False) -> RowShard:
    """Return the rows of `parameter` that this rank holds.

    The mesh dimension "tp" splits the rows first, then that of FSDP splits each part, regardless of their order in the
    mesh. `is_copy` marks a parameter that another pipeline stage owns (the second copy of a tied embedding).
    """
    local = local_tensor(parameter.detach())
    start, stop, is_first_copy = 0, parameter.shape[0], True
    if isinstance(parameter, DTensor):
        coordinate = parameter.device_mesh.get_coordinate()
        assert coordinate is not None
        start, stop, is_first_copy = held_rows(parameter, coordinate)
    if local.shape[0] != stop - start:
        raise AssertionError(f"{name}: expected rows [{start}, {stop}), the rank holds {local.shape[0]}")
    shape = tuple(parameter.shape)
    return RowShard(name, shape, start=start, stop=stop, tensor=local, is_writer=is_first_copy and not is_copy)


def held_rows(parameter: DTensor, coordinate: Sequence[int]) -> tuple[int, int, bool]:
    """Return the rows [start, stop) that the rank at `coordinate` of the parameter's mesh holds, and whether its copy
    of them is the first."""
    start, stop, is_first_copy = 0, parameter.shape[0], True
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ()
    # each dimension splits the range that the previous one left; "tp" (False) sorts before the others (True)
    for dim in sorted(range(mesh.ndim), key=lambda d: names[d] != "tp"):
        # along a dimension that replicates, the first rank writes
        if not parameter.placements[dim].is_replicate():
            low, high = split_rows(stop - start, mesh.size(dim), coordinate[dim])
            start, stop = start + low, start + high
        else:
            is_first_copy = is_first_copy and coordinate[dim] == 0
    return start, stop, is_first_copy


@torch.no_grad()
def copy_rows(shard: RowShard, rows: Tensor) -> None:
    """Copy `rows` [stop - start, ...] into the shard's memory."""
    shard.tensor.copy_(rows)
