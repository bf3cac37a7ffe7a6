"""Counts the collectives of a rank: how many, and their bytes, by kind and by axis of the mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from megatron_tf.parallel.mesh import AXES, Mesh

_OPERATIONS = {
    "allreduce_": ("all-reduce", 0, 1),
    "_allgather_base_": ("all-gather", 0, 2),
    "allgather_": ("all-gather", 0, 2),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 2),
    "alltoall_base_": ("all-to-all", 0, 2),
    "broadcast_": ("broadcast", 0, 1),
    "send": ("send", 0, 1),
    "recv_": ("receive", 0, 1),
}
"""Operation of torch.ops.c10d -> its kind, and which arguments are the larger side of its message and the group."""


@dataclass(frozen=True)
class Traffic:
    """The messages of one kind on one axis."""

    kind: str
    axis: str
    """pp, dp, cp, tp, dp_cp, dp_shard, dp_shard_cp, dp_replicate, "tied" (the two copies of a tied embedding) or
    "world"."""
    calls: int
    bytes: int
    """Size of the larger side: what an all-gather returns, what a reduce-scatter takes."""


class CollectiveCounter:
    """Counts the operations of torch.ops.c10d that it is told of."""

    def __init__(self, mesh: Mesh) -> None:
        self.axes = axis_of_group(mesh)
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}

    def see(self, func: Any, args: tuple[Any, ...]) -> None:
        """Count one operation. Raises AssertionError for one that is not known, so that no message is missed."""
        name = func.overloadpacket.__name__
        if name not in _OPERATIONS:
            raise AssertionError(f"c10d.{name} is not counted yet")
        kind, message, group = _OPERATIONS[name]
        key = kind, self.axes[ProcessGroup.unbox(args[group]).group_name]
        calls, size = self._seen.get(key, (0, 0))
        self._seen[key] = calls + 1, size + sum(leaf.nbytes for leaf in tree_leaves(args[message]) if _is_tensor(leaf))

    def traffic(self) -> list[Traffic]:
        """Return what was counted, ordered by axis and kind."""
        found = [Traffic(kind, axis, calls, size) for (kind, axis), (calls, size) in self._seen.items()]
        return sorted(found, key=lambda each: (each.axis, each.kind))


def axis_of_group(mesh: Mesh) -> Mapping[str, str]:
    """Return the name of every process group of this rank -> the axis that it belongs to."""
    if mesh.device_mesh is None or mesh.world is None:
        return {}
    axes: dict[str, str] = {mesh.world.group_name: "world"}
    if mesh.end_stages is not None:
        axes[mesh.end_stages.group_name] = "tied"
    # a dimension that spans the world shares its group
    for name in mesh.device_mesh.mesh_dim_names or ():
        axes[mesh.device_mesh[name].get_group().group_name] = name
    for joined in filter(None, (mesh.sharing, *mesh.flat.values())):
        for name in joined.mesh_dim_names or ():
            axes[joined.get_group(name).group_name] = name
    for axis in AXES:
        group = mesh.group(axis)
        if group is not None:
            axes[group.group_name] = axis
    return axes


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
