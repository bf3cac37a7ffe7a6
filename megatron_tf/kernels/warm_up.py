"""Compiling before the first step, so that one rank of a host fills the compiler's cache for the others."""

from collections.abc import Iterable

import torch

from megatron_tf.kernels.build_failure import describe_build_failure, is_build_failure
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.tokenformer.normalisation import Normalisation, accumulation_type


def warm_up(
    kernels: PattentionKernels,
    norm: Normalisation,
    shapes: Iterable[tuple[int, int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_shared: bool,
) -> str | None:
    """Run the kernels once for each shape of scores [rows, n] of a step; `is_shared` where ranks have a part of a row.

    Returns one line that says why they can't be built here; None where they are built. Every process must give the same
    shapes in the same order, by which compilers tell what they know already.
    """
    reduce = (lambda values: values * 1) if is_shared else None
    try:
        for rows, tokens in shapes:
            scores = torch.ones(rows, tokens, dtype=dtype, device=device)
            taus = torch.ones(rows, dtype=accumulation_type(scores), device=device)
            factor, weights = kernels.forward(norm, scores, tau=taus, reduce=reduce)
            kernels.backward(norm, scores, factor=factor, grad=weights, tau=taus, reduce=reduce)
    except Exception as error:
        if not is_build_failure(error):
            raise
        return describe_build_failure(kernels.name, error)
    return None
