"""Collectives with gradients, and asynchronous ones.

`group` is the process group of one mesh axis; None means a single rank, for which every function here is the
identity. No function modifies an incoming gradient in place, and only `start_all_reduce` its input. R is the number of
ranks in the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.11 has these only under the names that later releases deprecate
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: ProcessGroup | None) -> int:
    """Return the number of ranks in `group`."""
    return 1 if group is None else group.size()


def group_rank(group: ProcessGroup | None) -> int:
    """Return this rank's index in `group`."""
    return 0 if group is None else group.rank()


def all_reduce(x: Tensor, group: ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce x over the ranks by sum (or `op`), outside autograd."""
    if group is None:
        return x
    # torch reduces in place
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=op, group=group)
    return x


class Pending:
    """The result of an asynchronous collective; on a GPU only the stream waits for it.

    The collective writes to `received`, which must not be read before `wait`, and what it sends, `sent`, is kept until
    then. With a `target`, of the same shape, it is copied there. `wait` returns `result`, or by default `received`.
    """

    def __init__(
        self,
        work: dist.Work | None,
        received: Tensor,
        *,
        sent: Tensor | None = None,
        target: Tensor | None = None,
        result: Tensor | None = None,
    ) -> None:
        self.received = received
        self._work = work
        self._sent = sent
        self._target = target
        self._result = received if result is None else result

    def wait(self) -> Tensor:
        """Return the result."""
        if self._work is not None:
            self._work.wait()
        if self._target is not None:
            self._target.copy_(self.received)
        self._work = self._sent = self._target = None
        return self._result


def start_all_reduce(
    x: Tensor, group: ProcessGroup | None, *, out: Tensor | None = None, is_asynchronous: bool = True
) -> Pending:
    """Start to sum x, contiguous, over the ranks, in place; if `out` is another tensor, the sum is copied there."""
    work = None if group is None else dist.all_reduce(x, group=group, async_op=is_asynchronous)
    return Pending(work, x, target=None if out is x else out, result=out)


def start_all_gather(
    x: Tensor, dim: int, group: ProcessGroup | None, *, out: Tensor | None = None, is_asynchronous: bool = True
) -> Pending:
    """Start what `all_gather_copy` does, into `out` if given."""
    if group is None:
        return Pending(None, x, target=out, result=out)
    dim %= x.dim()
    x = x.detach().contiguous()
    if out is None:
        out = x.new_empty([size * group.size() if i == dim else size for i, size in enumerate(x.shape)])
    # ranks are gathered along a dimension 0, which is that of the ranks' parts in `out`
    received, target = _receiver(out.unflatten(dim, (group.size(), x.shape[dim])).movedim(dim, 0))
    work = _all_gather_single(received.flatten(0, 1), x, group=group, async_op=is_asynchronous)
    return Pending(work, received, sent=x, target=target, result=out)


def all_gather_copy(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """Concatenate the ranks' x along `dim`, outside autograd: size[dim] is multiplied by R."""
    return start_all_gather(x, dim, group, is_asynchronous=False).wait()


def start_reduce_scatter(
    x: Tensor, dim: int, group: ProcessGroup | None, *, out: Tensor | None = None, is_asynchronous: bool = True
) -> Pending:
    """Start what `reduce_scatter_copy` does, into `out` if given."""
    if group is None:
        return Pending(None, x, target=out, result=out)
    dim %= x.dim()
    ranks = group.size()
    if x.shape[dim] % ranks:
        raise ValueError(f"dimension {dim} of {tuple(x.shape)} cannot be split into {ranks} equal parts")
    # the reverse: `dim` is split into the ranks' parts, which move to dimension 0, where torch scatters them
    parts = x.detach().unflatten(dim, (ranks, x.shape[dim] // ranks)).movedim(dim, 0).contiguous()
    received, target = _receiver(torch.empty_like(parts[0]) if out is None else out)
    work = _reduce_scatter_single(received, parts.flatten(0, 1), group=group, async_op=is_asynchronous)
    return Pending(work, received, sent=parts, target=target, result=out)


def reduce_scatter_copy(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """Sum x over the ranks and return this rank's part along `dim`, outside autograd: size[dim] is divided by R."""
    return start_reduce_scatter(x, dim, group, is_asynchronous=False).wait()


def _receiver(out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a contiguous tensor to receive `out` in, and where to copy it from there, if that is another one."""
    if out.is_contiguous():
        return out, None
    return torch.empty_like(out, memory_format=torch.contiguous_format), out


def all_to_all_copy(x: Tensor, group: ProcessGroup | None, *, split_dim: int, concat_dim: int) -> Tensor:
    """Send part i of x along `split_dim` to rank i, and concatenate what comes along `concat_dim`, outside autograd.

    size[split_dim] is divided by R, and size[concat_dim] multiplied.
    """
    if group is None:
        return x
    split_dim, concat_dim = split_dim % x.dim(), concat_dim % x.dim()
    ranks = group.size()
    # as in reduce_scatter_copy, the parts move to dimension 0, and then the ranks' parts from there
    parts = x.detach().unflatten(split_dim, (ranks, x.shape[split_dim] // ranks)).movedim(split_dim, 0).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1)


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


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split_dim: int, concat_dim: int, group: ProcessGroup) -> Tensor:
        ctx.dims = split_dim, concat_dim
        ctx.group = group
        return all_to_all_copy(x, group, split_dim=split_dim, concat_dim=concat_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        split_dim, concat_dim = ctx.dims
        return all_to_all_copy(grads[0], ctx.group, split_dim=concat_dim, concat_dim=split_dim), None, None, None


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
    """Concatenate the ranks' x along `dim`; backward reduce-scatters the ranks' partial gradients."""
    return x if group is None else _AllGather.apply(x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """Sum x over the ranks and return this rank's part along `dim`; backward all-gathers the gradients."""
    return x if group is None else _ReduceScatter.apply(x, dim, group)


def all_to_all(x: Tensor, group: ProcessGroup | None, *, split_dim: int, concat_dim: int) -> Tensor:
    """Send part i of x along `split_dim` to rank i, and concatenate what comes along `concat_dim`; backward sends the
    gradients back."""
    return x if group is None else _AllToAll.apply(x, split_dim, concat_dim, group)


def sum_forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum the ranks' partial x; backward passes the gradient, the same on every rank, unchanged."""
    return x if group is None else _SumForward.apply(x, group)


def sum_backward(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return x, the same on every rank, unchanged; backward sums the ranks' partial gradients."""
    return x if group is None else _SumBackward.apply(x, group)
