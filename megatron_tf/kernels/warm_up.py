"""Compile kernels before the first step, so that one rank of each host fills the compiler's cache for the others."""

from collections.abc import Callable, Iterable

import torch

from megatron_tf.kernels.build_failure import describe_build_failure, is_build_failure
from megatron_tf.kernels.loss import LossKernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.tokenformer.dtypes import wide_dtype
from megatron_tf.tokenformer.normalization import Normalization


def warm_up(
    kernels: PattentionKernels,
    norm: Normalization,
    shapes: Iterable[tuple[int, int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_shared: bool,
) -> str | None:
    """Run the kernels once for each shape of scores [rows, n] that a step uses.

    `is_shared` means that several ranks share each row. Returns one line that says why the kernels can't be built here,
    or None on success. Every process must pass the same shapes in the same order: compilers key their caches on it.
    """
    reduce = (lambda values: values * 1) if is_shared else None

    def run() -> None:
        for rows, tokens in shapes:
            scores = torch.ones(rows, tokens, dtype=dtype, device=device)
            taus = torch.ones(rows, dtype=wide_dtype(scores.dtype), device=device)
            factor, weights = kernels.forward(norm, scores, tau=taus, reduce=reduce)
            kernels.backward(norm, scores, factor=factor, grad=weights, tau=taus, reduce=reduce)

    return _build_failure(kernels.name, run)


def warm_up_loss(kernels: LossKernels, num_ids: int, *, dtype: torch.dtype, device: torch.device) -> str | None:
    """Run the kernels of the loss once for `num_ids` of the vocabulary; returns what `warm_up` does."""

    def run() -> None:
        logits = torch.zeros(1, num_ids, dtype=dtype, device=device)
        target = torch.zeros(1, dtype=torch.int64, device=device)
        log_total, _ = kernels.statistics(logits, target)
        kernels.gradient(logits, target, log_total=log_total, scale=log_total)

    return _build_failure(kernels.name, run)


def _build_failure(name: str, run: Callable[[], None]) -> str | None:
    """Return one line that says why the kernels `name`, which `run` runs, can't be built here, or None on success."""
    try:
        run()
    except Exception as error:
        if not is_build_failure(error):
            raise
        return describe_build_failure(name, error)
    return None
