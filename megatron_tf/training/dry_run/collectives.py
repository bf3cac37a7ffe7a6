"""Counts the collectives of a rank: how many, and their bytes, by kind and by axis of the mesh."""

from collections import Counter
from collections.abc import Iterable, Mapping
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
    is_overlapped: bool = False
    """Whether the rank computes meanwhile; sends and receives are not known to."""


class CollectiveCounter:
    """Counts the operations of torch.ops.c10d that it is told of. `axes` is the `axis_of_group` of the mesh."""

    def __init__(self, axes: Mapping[str, str]) -> None:
        self.axes = axes
        self._seen: Counter[tuple[str, str, int, bool]] = Counter()

    def see(self, func: Any, args: tuple[Any, ...]) -> None:
        """Count one operation. Raises AssertionError for one that is not known, so that no message is missed."""
        name = func.overloadpacket.__name__
        if name not in _OPERATIONS:
            raise AssertionError(f"c10d.{name} is not counted yet")
        kind, message, group = _OPERATIONS[name]
        axis = self.axes[ProcessGroup.unbox(args[group]).group_name]
        size = sum(leaf.nbytes for leaf in tree_leaves(args[message]) if _is_tensor(leaf))
        self._seen[axis, kind, size, _is_asynchronous(func, args)] += 1

    def messages(self) -> list[Traffic]:
        """Return what was counted, each size for itself, ordered by axis, kind and size."""
        return [
            Traffic(kind, axis, calls=calls, bytes=calls * size, is_overlapped=is_overlapped)
            for (axis, kind, size, is_overlapped), calls in sorted(self._seen.items())
        ]

    def traffic(self) -> list[Traffic]:
        """Return what was counted, ordered by axis and kind."""
        return add_up(self.messages())


def add_up(traffic: Iterable[Traffic]) -> list[Traffic]:
    """Add up the messages of each kind on each axis, overlapped or not."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for each in traffic:
        calls, size = sums.get((each.axis, each.kind), (0, 0))
        sums[each.axis, each.kind] = calls + each.calls, size + each.bytes
    return [Traffic(kind, axis, *counts) for (axis, kind), counts in sorted(sums.items()) if counts[0]]


def axis_of_group(mesh: Mesh) -> Mapping[str, str]:
    """Return the name of every process group of this rank -> the axis that it belongs to."""
    if mesh.device_mesh is None or mesh.world is None:
        return {}
    axes: dict[str, str] = {mesh.world.group_name: "world"}
    if mesh.end_stages is not None:
        axes[mesh.end_stages.group_name] = "tied"
    # a dimension that spans the world shares its group
    for name in mesh.device_mesh.mesh_dim_names or ():
        axes[mesh.device_mesh.get_group(name).group_name] = name
    for joined in filter(None, (mesh.sharing, *mesh.flat.values())):
        for name in joined.mesh_dim_names or ():
            axes[joined.get_group(name).group_name] = name
    for axis in AXES:
        group = mesh.group(axis)
        if group is not None:
            axes[group.group_name] = axis
    return axes


def _is_asynchronous(func: Any, args: tuple[Any, ...]) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    if "async_op" not in names:
        return False
    position = names.index("async_op")
    return args[position] if position < len(args) else True  # torch leaves out the default


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
