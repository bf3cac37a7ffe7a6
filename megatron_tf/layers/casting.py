"""Parameters in the dtype of the activations: cast at each use, or once for all micro-batches of a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class CastingModule(nn.Module):
    """A module that computes in the dtype of its input, to which it casts its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[tuple[str, torch.dtype], Tensor] | None = None

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return this rank's rows of the parameter `name` in `dtype`; gradients arrive in the parameter's own dtype."""
        rows: Tensor = getattr(self, name)
        if rows.dtype == dtype:
            return rows
        if self._kept is None:
            return rows.to(dtype)
        return _Cast.apply(rows, self.detached(name, dtype))

    def detached(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the same rows without a path for gradients."""
        rows: Tensor = getattr(self, name).detach()
        if rows.dtype == dtype or self._kept is None:
            return rows.to(dtype)
        if (name, dtype) not in self._kept:
            self._kept[name, dtype] = rows.to(dtype)
        return self._kept[name, dtype]


@contextmanager
def keeping_casts(*models: nn.Module) -> Iterator[None]:
    """Cast each parameter of the models at its first use in the context, and reuse the result until its end.

    Parameters must not change within the context.
    """
    modules = [module for model in models for module in model.modules() if isinstance(module, CastingModule)]
    for module in modules:
        module._kept = {}
    try:
        yield
    finally:
        for module in modules:
            module._kept = None


class _Cast(torch.autograd.Function):
    """Acts as `rows.to(cast.dtype)` in forward and backward, with its result `cast` already computed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = rows.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None
