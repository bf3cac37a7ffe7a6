"""The mesh of ranks (pipeline, data, context, tensor) as one DeviceMesh, and how a process joins it.

Data- and context-parallel ranks compute from the same parameters, of which each computes a part of the gradients. The
axis "dp_cp" joins them: over it, gradients and losses are averaged, and parameters sharded.

If parameters are sharded over fewer than all data-parallel ranks, the data axis is two dimensions of the DeviceMesh:
"dp_shard" within a group that shares one copy, and "dp_replicate" over the groups.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_tf.config import ParallelConfig
from megatron_tf.errors import UserError
from megatron_tf.parallel.collectives import group_size
from megatron_tf.parallel.launch import adopt_launcher, device_index, number_of
from megatron_tf.parallel.rendezvous import Check, join_ranks

T = TypeVar("T")
Axis = Literal["pp", "dp", "cp", "tp", "dp_cp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "cp", "tp")


class LayoutError(UserError):
    """The ranks that were started do not fit the configured layout."""


@dataclass(frozen=True)
class Mesh:
    """This rank's coordinates and process groups. `device_mesh` is None for one process without torch.distributed.

    `store` is the key-value store of the rendezvous, for any other small messages between ranks.
    """

    device: torch.device
    device_mesh: DeviceMesh | None = None
    store: dist.Store | None = None
    local_rank: int = 0
    """This rank's index on its host."""
    flat: Mapping[str, DeviceMesh] = field(default_factory=dict)
    """The axes that are not one dimension of `device_mesh`."""
    sharing: DeviceMesh | None = None
    """The ranks that have the same parameters, for FSDP: a mesh of one dimension that shards, or of one that replicates
    and one that shards; None for a single process."""
    end_stages: ProcessGroup | None = None
    """The ranks of the first and the last pipeline stage with this rank's other coordinates, which share a tied
    embedding; None on a stage in between, and if there is only one stage."""

    def size(self, axis: Axis) -> int:
        """Return the number of ranks along `axis`."""
        return 1 if self.device_mesh is None else self._axes[axis].size()

    def rank(self, axis: Axis) -> int:
        """Return this rank's index along `axis`."""
        return 0 if self.device_mesh is None else self._axes[axis].get_local_rank()

    def group(self, axis: Axis) -> ProcessGroup | None:
        """Return the group of ranks that differ from this one only along `axis`; None if this is the only one."""
        return None if self.device_mesh is None or self.size(axis) == 1 else self._axes[axis].get_group()

    @cached_property
    def _axes(self) -> Mapping[str, DeviceMesh]:
        # kept, since torch makes a new mesh for each slice of one
        assert self.device_mesh is not None
        return {axis: self.device_mesh[axis] for axis in AXES if axis not in self.flat} | {**self.flat}

    @property
    def world(self) -> ProcessGroup | None:
        """Return the group of all ranks; None for a single process."""
        return None if self.device_mesh is None else dist.group.WORLD

    def new_world(self, timeout: timedelta) -> ProcessGroup | None:
        """Create another group of all ranks, over gloo, for a background thread. Collective."""
        return None if self.device_mesh is None else dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """Gather the `value` of every rank on every rank, in rank order. Collective."""
        values = [value] * group_size(self.world)
        if self.world is not None:
            dist.all_gather_object(values, value, group=self.world)
        return values

    def from_first_rank(self, value: T) -> T:
        """Return the `value` of rank 0 on every rank. Collective."""
        values = [value]
        if self.world is not None:
            dist.broadcast_object_list(values, src=0, group=self.world)
        return values[0]

    def first_failure(self, failure: str | None) -> str | None:
        """Return on every rank the message of the lowest rank that failed, or None if none did. Collective."""
        return next((each for each in self.gather(failure) if each is not None), None)

    def first_on_host_first(self, action: Callable[[], str | None]) -> str | None:
        """Run `action` on one rank of each host first, so that the others can use the files it writes. Collective.

        `action` returns the reason for a failure, or None. Returns the `first_failure`; after a failure on the first
        rank of any host, the other ranks do not run it.
        """
        for is_first in (True, False):
            failure = self.first_failure(action() if is_first == (self.local_rank == 0) else None)
            if failure is not None:
                return failure
        return None

    @property
    def is_first_rank(self) -> bool:
        """Return whether this is rank 0, which writes logs and files for the whole run."""
        return self.device_mesh is None or dist.get_rank() == 0


def data_parallel_size(
    world_size: int,
    *,
    tensor: int,
    pipeline: int,
    context: int = 1,
    requested: int | None = None,
    shard_size: int | None = None,
) -> int:
    """Return the number of data-parallel replicas that fill the world.

    Raises LayoutError, with the numbers, if the layout does not fill the world exactly, or if `shard_size` does not
    divide the number of replicas.
    """
    needed = tensor * pipeline * context
    data, rest = divmod(world_size, needed)
    if rest or data == 0 or (requested is not None and requested != data):
        layout = f"tensor {tensor} x pipeline {pipeline}"
        layout += (f" x context {context}" if context > 1 else "") + (f" x data {requested}" if requested else "")
        need = needed * (requested or 1)
        raise LayoutError(
            f"the world has {world_size} rank(s), but the layout {layout} needs "
            f"{'' if requested else 'a multiple of '}{need}: start that many, or change the layout"
        )
    if data % (shard_size or 1):
        raise LayoutError(f"{data} replica(s) are not a multiple of parallel.data_parallel_shard_size ({shard_size})")
    return data


def replicas_of(parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of data-parallel replicas of a configured layout. Raises LayoutError as above."""
    return data_parallel_size(
        world_size,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        requested=parallel.data_parallel_size,
        shard_size=parallel.data_parallel_shard_size,
    )


def init_mesh(
    *,
    tensor: int,
    pipeline: int,
    data: int | None,
    timeout: timedelta,
    context: int = 1,
    shard_size: int | None = None,
    limit: timedelta | None = None,
    check: Check | None = None,
) -> Mesh:
    """Join the other ranks that torchrun, srun or mpiexec started, and build the mesh over them.

    Without a launcher this is a single process, and torch.distributed is not initialized. `timeout` is that of every
    group; the rendezvous has to complete within `limit`, by default the same. `check` is called right after the
    rendezvous, before the layout is checked.
    """
    adopt_launcher()
    world_size, local_rank = number_of("WORLD_SIZE"), number_of("LOCAL_RANK", 0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    size_of_data_axis = partial(
        data_parallel_size, world_size, tensor=tensor, pipeline=pipeline, context=context, shard_size=shard_size
    )
    if world_size == 1:
        size_of_data_axis(requested=data)
        return Mesh(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # the layout is checked later: on a rank with a different configuration it would fail alone, and the others hang
    store = join_ranks(backend, device, timeout=timeout, limit=limit or timeout, check=check)
    data = size_of_data_axis(requested=data)
    mesh = build_mesh(device, tensor=tensor, pipeline=pipeline, data=data, context=context, shard_size=shard_size)
    return dataclasses.replace(mesh, store=store, local_rank=local_rank)


def build_mesh(
    device: torch.device, *, tensor: int, pipeline: int, data: int, context: int = 1, shard_size: int | None = None
) -> Mesh:
    """Build the mesh over an initialized world of pipeline x data x context x tensor ranks.

    Tensor-parallel ranks are adjacent; next come the context-parallel ranks, and the `shard_size` replicas that share a
    copy of the parameters (all replicas by default). Creates every group that a run needs, whatever its stages of
    growth: each group holds its own buffers and connections.
    """
    if shard_size is None or shard_size == data:
        mesh = init_device_mesh(device.type, (pipeline, data, context, tensor), mesh_dim_names=AXES)
        joined = _joined(mesh, ("dp",), name="dp_cp")
        return Mesh(device, mesh, flat={"dp_cp": joined}, sharing=joined, end_stages=_end_stages(mesh))
    sizes = (pipeline, data // shard_size, shard_size, context, tensor)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "cp", "tp"))
    flat = {"dp": mesh["dp_replicate", "dp_shard"]._flatten("dp")}
    flat["dp_cp"] = _joined(mesh, ("dp_replicate", "dp_shard"), name="dp_cp") if context > 1 else flat["dp"]
    # private, as _flatten: torch has no public API for a mesh of dimensions that are joined ones
    sharing = DeviceMesh._concatenate([mesh["dp_replicate"], _joined(mesh, ("dp_shard",), name="dp_shard_cp")])
    return Mesh(device, mesh, flat=flat, sharing=sharing, end_stages=_end_stages(mesh))


def _joined(mesh: DeviceMesh, dims: tuple[str, ...], *, name: str) -> DeviceMesh:
    """Join dimensions of a mesh with "cp" to one. Collective, except for a context-parallel size of 1."""
    # _flatten is private: torch has no public API for one group over two dimensions of a mesh
    return mesh[(*dims, "cp")]._flatten(name) if mesh["cp"].size() > 1 else mesh[dims]


def _end_stages(mesh: DeviceMesh) -> ProcessGroup | None:
    """Create the group of the first and the last stage with this rank's other coordinates. Collective."""
    if mesh.mesh.shape[0] == 1:
        return None
    pairs = mesh.mesh[[0, -1]].flatten(1).t().tolist()
    mine, _ = dist.new_subgroups_by_enumeration(pairs)
    return mine
