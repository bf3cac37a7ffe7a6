"""Deterministic algorithms, for `training.deterministic`."""

import os

import torch

_CUBLAS_WORKSPACE = ":4096:8"  # one of the two settings with which cuBLAS is deterministic


def use_deterministic_algorithms() -> None:
    """Make torch use deterministic algorithms, and raise RuntimeError in operations without one.

    Call this before the GPU is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # that memory is never read
    torch.backends.cudnn.benchmark = False
