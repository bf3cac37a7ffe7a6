"""The mesh of ranks: (pipeline, data, tensor) as one DeviceMesh, and how a process finds its place in it.

Where replicas share their copies of the parameters in groups smaller than all of them, the data axis is two of the
DeviceMesh: "dp_replicate" over the groups and "dp_shard" within one.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_tf.errors import UserError
from megatron_tf.parallel.collectives import group_size
from megatron_tf.parallel.launch import adopt_launcher, number_of
from megatron_tf.parallel.meeting import Check, meet

Axis = Literal["pp", "dp", "tp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "tp")


class LayoutError(UserError):
    """The ranks that were started do not make the layout that was requested."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `device_mesh` is None for a run of one process without torch.distributed.

    `store` is where the ranks found each other, for what else they have to tell.
    """

    device: torch.device
    device_mesh: DeviceMesh | None = None
    store: dist.Store | None = None
    local_rank: int = 0
    """This rank's index among those of its host."""
    flat_data_mesh: DeviceMesh | None = None
    """The data axis as one, where it is two of `device_mesh`."""

    def size(self, axis: Axis) -> int:
        """Ranks along `axis`."""
        return 1 if self.device_mesh is None else self._axis(axis).size()

    def rank(self, axis: Axis) -> int:
        """This rank's index along `axis`."""
        return 0 if self.device_mesh is None else self._axis(axis).get_local_rank()

    def group(self, axis: Axis) -> ProcessGroup | None:
        """The ranks that differ from this one along `axis` alone; None where there is only this one."""
        return None if self.device_mesh is None or self.size(axis) == 1 else self._axis(axis).get_group()

    def submesh(self, axis: Axis) -> DeviceMesh | None:
        """The one-dimensional mesh behind `group`."""
        return None if self.device_mesh is None or self.size(axis) == 1 else self._axis(axis)

    def replicas(self) -> DeviceMesh | None:
        """The data axis as parameters are spread over it: (dp,) or (dp_replicate, dp_shard); None for one replica."""
        if self.flat_data_mesh is None or self.device_mesh is None:
            return self.submesh("dp")
        return self.device_mesh["dp_replicate", "dp_shard"]

    def _axis(self, axis: Axis) -> DeviceMesh:
        assert self.device_mesh is not None
        return self.flat_data_mesh if axis == "dp" and self.flat_data_mesh is not None else self.device_mesh[axis]

    @property
    def world(self) -> ProcessGroup | None:
        """All ranks."""
        return None if self.device_mesh is None else dist.group.WORLD

    def new_world(self, timeout: timedelta) -> ProcessGroup | None:
        """All ranks in a group of its own for objects on the host, for a thread beside the main one. Every rank must
        call it."""
        return None if self.device_mesh is None else dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of each rank, by rank; the same on every rank, which all call it."""
        values = [value] * group_size(self.world)
        if self.world is not None:
            dist.all_gather_object(values, value, group=self.world)
        return values

    def first_failure(self, failure: str | None) -> str | None:
        """What the lowest rank that failed says of it; None if none did. The same on every rank, which all call it."""
        return next((each for each in self.gather(failure) if each is not None), None)

    def first_on_host_first(self, action: Callable[[], str | None]) -> str | None:
        """Do something on one rank of each host, and then on the others, which find what it left there.

        `action` returns why it failed, or None. Returns the `first_failure`; after one on the first rank of any host
        the other ranks do not try.
        """
        for is_first in (True, False):
            failure = self.first_failure(action() if is_first == (self.local_rank == 0) else None)
            if failure is not None:
                return failure
        return None

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.device_mesh is None or dist.get_rank() == 0


def data_parallel_size(
    world_size: int, *, tensor: int, pipeline: int, requested: int | None = None, shard_size: int | None = None
) -> int:
    """Replicas that fit the world. Raises LayoutError, with the numbers, where the layout does not fill it, or
    `shard_size` does not divide the replicas."""
    data, rest = divmod(world_size, tensor * pipeline)
    if rest or data == 0 or (requested is not None and requested != data):
        layout = f"tensor {tensor} x pipeline {pipeline}" + (f" x data {requested}" if requested else "")
        need = tensor * pipeline * (requested or 1)
        raise LayoutError(
            f"the world has {world_size} rank(s), but the layout {layout} needs "
            f"{'' if requested else 'a multiple of '}{need}: start that many, or change the layout"
        )
    if data % (shard_size or 1):
        raise LayoutError(f"{data} replica(s) are no multiple of parallel.data_parallel_shard_size ({shard_size})")
    return data


def init_mesh(
    *,
    tensor: int,
    pipeline: int,
    data: int | None,
    timeout: timedelta,
    shard_size: int | None = None,
    limit: timedelta | None = None,
    check: Check | None = None,
) -> Mesh:
    """Join the other ranks that torchrun, srun or mpiexec started and lay the mesh over them.

    Without a launcher this is one process and torch.distributed stays untouched. Every wait of every group ends
    with an error after `timeout`; the ranks have to meet within `limit`, by default the same. `check` is called when
    they have met, before the layout is looked at.
    """
    adopt_launcher()
    world_size, local_rank = number_of("WORLD_SIZE"), number_of("LOCAL_RANK", 0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size == 1:
        data_parallel_size(world_size, tensor=tensor, pipeline=pipeline, requested=data, shard_size=shard_size)
        return Mesh(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # the layout comes after the check: on a rank of another configuration it would fail alone, and the others wait
    store = meet(backend, device, timeout=timeout, limit=limit or timeout, check=check)
    data = data_parallel_size(world_size, tensor=tensor, pipeline=pipeline, requested=data, shard_size=shard_size)
    mesh = build_mesh(device, tensor=tensor, pipeline=pipeline, data=data, shard_size=shard_size)
    return dataclasses.replace(mesh, store=store, local_rank=local_rank)


def build_mesh(device: torch.device, *, tensor: int, pipeline: int, data: int, shard_size: int | None = None) -> Mesh:
    """The mesh over an initialized world of pipeline x data x tensor ranks; tensor-parallel ranks are neighbours, and
    after them the `shard_size` replicas that share a copy of the parameters (all by default)."""
    if shard_size is None or shard_size == data:
        return Mesh(device, init_device_mesh(device.type, (pipeline, data, tensor), mesh_dim_names=AXES))
    sizes = (pipeline, data // shard_size, shard_size, tensor)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
    # _flatten is private: torch has no public way to one group over two dimensions of a mesh
    return Mesh(device, mesh, flat_data_mesh=mesh["dp_replicate", "dp_shard"]._flatten("dp"))


def first_and_last_stage_group(mesh: Mesh) -> ProcessGroup | None:
    """The ranks of the first and the last stage with this rank's other coordinates; None on a stage between or alone.

    Every rank of the world must call it, once: making a group is collective.
    """
    if mesh.device_mesh is None or mesh.size("pp") == 1:
        return None
    pairs = mesh.device_mesh.mesh[[0, -1]].flatten(1).t().tolist()
    mine, _ = dist.new_subgroups_by_enumeration(pairs)
    return mine
