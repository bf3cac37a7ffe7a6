"""What computes a Pattention: what happens between its two products, or all of it where no gradient is needed."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from megatron_tf.tokenformer.normalisation import Normalisation, Reduce


class PattentionKernels(Protocol):
    """From scores to the weights of the values, and back.

    `reduce` sums a row's number over the tensor-parallel ranks that share the row; None where one rank has all of it.
    """

    name: ClassVar[str]
    """The choice in the configuration that takes them."""
    stores_columns: ClassVar[bool] = False
    """Whether they are fastest on values that are stored column by column; they take values stored in any way."""

    def forward(
        self, norm: Normalisation, scores: Tensor, *, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """Normalize scores [R, n] with tau [R]: (factor [R] in accumulation type, weights of the values [R, n])."""

    def backward(
        self, norm: Normalisation, scores: Tensor, *, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """Return the weights again and the gradient of the scores, each [R, n]; `grad`, that of the weights, may be
        overwritten."""

    def infer(
        self, norm: Normalisation, x: Tensor, *, keys: Sequence[Tensor], values: Sequence[Tensor], taus: Sequence[float]
    ) -> Tensor | None:
        """Compute G whole Pattentions of x [T, D], keys [N, D] and values [N, E] on one rank: y [G, T, E].

        Returns None where these kernels have no way of their own to do so, as here, and where a gradient is needed: the
        caller then makes the products itself.
        """
        return None
