"""Collectives with gradients, named for what they do.

`group` is the process group of one mesh axis; None means a single rank, for which every function here is the
identity. No function changes its input or an incoming gradient in place. R is the number of ranks of the group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.11 knows these only by the names that later releases deprecate
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: ProcessGroup | None) -> int:
    """Ranks in `group`."""
    return 1 if group is None else group.size()


def group_rank(group: ProcessGroup | None) -> int:
    """This rank's index in `group`."""
    return 0 if group is None else group.rank()


def all_reduce(x: Tensor, group: ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sum (or `op`) of x over the ranks, outside autograd."""
    if group is None:
        return x
    # torch reduces in place
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=op, group=group)
    return x


def all_gather_copy(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """The ranks' x laid end to end along `dim`, outside autograd: size[dim] grows by R."""
    if group is None:
        return x
    dim %= x.dim()
    x = x.detach().contiguous()
    # ranks arrive along a new dimension 0; moved in front of `dim` and merged with it, they lie end to end
    gathered = x.new_empty((group.size(), *x.shape))
    _all_gather_single(gathered.flatten(0, 1), x, group=group)
    return gathered.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter_copy(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """This rank's part along `dim` of the sum of x over the ranks, outside autograd: size[dim] falls by R."""
    if group is None:
        return x
    dim %= x.dim()
    ranks = group.size()
    if x.shape[dim] % ranks:
        raise ValueError(f"dimension {dim} of {tuple(x.shape)} cannot be cut into {ranks} equal parts")
    # the reverse: `dim` is cut by ranks, whose parts move to the front, where torch scatters them
    parts = x.detach().unflatten(dim, (ranks, x.shape[dim] // ranks)).movedim(dim, 0).contiguous()
    mine = torch.empty_like(parts[0])
    _reduce_scatter_single(mine, parts.flatten(0, 1), group=group)
    return mine


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim = dim
        ctx.group = group
        return all_gather_copy(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_copy(grads[0], ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim = dim
        ctx.group = group
        return reduce_scatter_copy(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_copy(grads[0], ctx.dim, ctx.group), None, None


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


def all_gather(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """Parts of every rank laid end to end along `dim`; gradients, partial on each rank, are reduce-scattered."""
    return x if group is None else _AllGather.apply(x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """This rank's part along `dim` of the sum over ranks; gradients are all-gathered."""
    return x if group is None else _ReduceScatter.apply(x, dim, group)


def sum_forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over ranks of partial results; the gradient, the same on every rank, passes as it is."""
    return x if group is None else _SumForward.apply(x, group)


def sum_backward(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """x, the same on every rank, as it is; its gradients, partial on each rank, are summed."""
    return x if group is None else _SumBackward.apply(x, group)
