"""The interface of Pattention kernels: the pass between the two products, or the whole layer for inference."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from megatron_tf.tokenformer.normalization import Normalization, Reduce


class PattentionKernels(Protocol):
    """Computes the weights of the value tokens from the scores, and the gradient of the scores.

    `reduce` combines one number per row over the tensor-parallel ranks that share the row; it is None if a single rank
    holds whole rows.
    """

    name: ClassVar[str]
    """The value of `kernels.pattention` that selects these kernels."""
    stores_columns: ClassVar[bool] = False
    """Whether they are fastest with value tokens stored in column-major order; they accept any strides."""

    def forward(
        self, norm: Normalization, scores: Tensor, *, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """Normalize scores [R, n] with the temperatures tau [R].

        Returns the factor [R], in the accumulation dtype, and the weights of the values [R, n].
        """

    def backward(
        self, norm: Normalization, scores: Tensor, *, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        """Recompute the weights and compute the gradient of the scores, each [R, n].

        `grad` [R, n] is the gradient of the weights; it may be overwritten.
        """

    def infer(
        self, norm: Normalization, x: Tensor, *, keys: Sequence[Tensor], values: Sequence[Tensor], taus: Sequence[float]
    ) -> Tensor | None:
        """Compute G whole Pattentions of x [T, D], each with keys [N, D] and values [N, E], on one rank: y [G, T, E].

        Returns None if these kernels have no fused inference path, as here, or if a gradient is needed; the caller then
        computes the two products itself.
        """
        return None
