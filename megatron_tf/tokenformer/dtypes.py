"""Dtypes of weights and activations, by their names in the configuration and in --dtype."""

import torch

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def activation_dtype(precision: str) -> torch.dtype:
    """Return the dtype of activations under a `training.precision`."""
    return DTYPES["bf16" if precision == "fp8" else precision]  # fp8 applies to products only


def parameter_dtype(precision: object) -> torch.dtype:
    """Return the dtype of parameters and Adam moments, and so of checkpoints, under a `training.precision`.

    That is fp64 for fp64, and fp32 for every other value, including those of later versions.
    """
    return torch.float64 if precision == "fp64" else torch.float32


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of parameters, statistics and losses in training with activations of `dtype`: fp64 for fp64,
    otherwise fp32."""
    return torch.promote_types(dtype, torch.float32)
