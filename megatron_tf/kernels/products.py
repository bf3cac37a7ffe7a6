"""The matrix products of a Pattention: two in forward, four in backward."""

from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_tf.kernels.value_product import mix_values

Side = Literal["left", "right"]


class Products(Protocol):
    """Matrix products of operands of one dtype, accumulated in fp32, or in fp64 for fp64."""

    def mm(self, a: Tensor, b: Tensor, *, out: Tensor | None = None, gradient: Side | None = None) -> Tensor:
        """Multiply a [M, K] by b [K, N] -> [M, N]; the result is written into `out` if given.

        `gradient` names the operand that is a gradient and needs a wider range, if any.
        """

    def add_mm(self, total: Tensor, a: Tensor, b: Tensor, *, gradient: Side | None = None) -> None:
        """Add a b to `total` [M, N] in place."""

    def mix(self, weights: Tensor, values: Tensor, *, out: Tensor) -> None:
        """Write P V into out [R, E], with P [R, n] and V [n, E]."""


class PlainProducts(Products):
    """Products by torch.mm, in the dtype of the operands."""

    def mm(self, a: Tensor, b: Tensor, *, out: Tensor | None = None, gradient: Side | None = None) -> Tensor:
        return torch.mm(a, b, out=out)

    def add_mm(self, total: Tensor, a: Tensor, b: Tensor, *, gradient: Side | None = None) -> None:
        total.addmm_(a, b)

    def mix(self, weights: Tensor, values: Tensor, *, out: Tensor) -> None:
        mix_values(weights, values, out)
