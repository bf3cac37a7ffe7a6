"""Only algorithms that repeat every bit, for `training.deterministic`."""

import os

import torch

_CUBLAS_WORKSPACE = ":4096:8"  # one of the two settings under which cuBLAS repeats its bits


def use_deterministic_algorithms() -> None:
    """Let torch take them, and raise RuntimeError at an operation without one; to call before the GPU is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is never read
    torch.backends.cudnn.benchmark = False
