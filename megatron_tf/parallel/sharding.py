"""The rows of a logical tensor that this rank holds.

All sharding is on dimension 0: parameter tokens and vocabulary over tensor-parallel ranks, and each rank's rows again
over data-parallel ranks. A rank therefore holds one contiguous range of rows of each logical tensor, and that range is
all that the optimizer, checkpoints and tools need to know. The parameter of a tensor-parallel rank is a plain tensor of
its rows, of which FSDP makes a DTensor over the data-parallel ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_tf.parallel.mesh import Mesh


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


@dataclass(frozen=True)
class Place:
    """A rank among those that parameters are distributed over."""

    tensor: int
    """Its index among the tensor-parallel ranks."""
    tensor_ranks: int
    replica: Mapping[str, int]
    """Its index along each dimension of the mesh of FSDP."""


def local_tensor(parameter: Tensor) -> Tensor:
    """Return the rows that this rank holds of a parameter, which is a DTensor between the steps of FSDP."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def split_rows(rows: int, parts: int, index: int) -> tuple[int, int]:
    """Return the range of part `index` of `rows` split as by `torch.chunk`: the last parts may be short or empty."""
    size = -(-rows // parts)
    return min(rows, index * size), min(rows, (index + 1) * size)


def place_on(mesh: Mesh) -> Place:
    """Return this rank's place."""
    sharing = mesh.sharing
    replica = {name: sharing.get_local_rank(name) for name in sharing.mesh_dim_names or ()} if sharing else {}
    return Place(mesh.rank("tp"), mesh.size("tp"), replica)


def row_shard(
    name: str, parameter: Tensor, shape: tuple[int, ...], *, is_sharded: bool, place: Place, is_copy: bool = False
) -> RowShard:
    """Return the rows of `parameter`, which holds some of a logical tensor of `shape`, at this rank's place.

    `is_sharded` says whether tensor-parallel ranks share its rows. `is_copy` marks a parameter that another pipeline
    stage owns (the second copy of a tied embedding).
    """
    local = local_tensor(parameter.detach())
    start, stop, is_first_copy = held_rows(parameter, shape[0], is_sharded=is_sharded, place=place)
    if local.shape[0] != stop - start:
        raise AssertionError(f"{name}: expected rows [{start}, {stop}), the rank holds {local.shape[0]}")
    return RowShard(name, shape, start=start, stop=stop, tensor=local, is_writer=is_first_copy and not is_copy)


def held_rows(parameter: Tensor, rows: int, *, is_sharded: bool, place: Place) -> tuple[int, int, bool]:
    """Return the rows [start, stop) of all `rows` of a parameter that the rank at `place` holds, and whether its copy
    of them is the first.

    Tensor-parallel ranks split the rows, if `is_sharded`, and FSDP splits the part of each.
    """
    start, stop = split_rows(rows, place.tensor_ranks, place.tensor) if is_sharded else (0, rows)
    is_first_copy = is_sharded or place.tensor == 0
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for dim, name in enumerate(mesh.mesh_dim_names or ()):
            # along a dimension that replicates, the first rank writes
            if parameter.placements[dim].is_replicate():
                is_first_copy = is_first_copy and place.replica[name] == 0
            else:
                low, high = split_rows(stop - start, mesh.size(dim), place.replica[name])
                start, stop = start + low, start + high
    return start, stop, is_first_copy


@torch.no_grad()
def copy_rows(shard: RowShard, rows: Tensor) -> None:
    """Copy `rows` [stop - start, ...] into the shard's memory."""
    shard.tensor.copy_(rows)
