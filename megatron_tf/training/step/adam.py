"""AdamW of torch, apex and transformer-engine behind one signature; torch's own is the measure."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def adamw(
    choice: str, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW over groups of plain tensors: torch's fused one, or FusedAdam of apex or transformer-engine.

    `set_adam_state` fills its state, which these keep in different places.
    """
    if choice == "torch":
        return torch.optim.AdamW(list(groups), lr=lr, betas=betas, eps=eps, fused=True)
    name = {"apex": "apex.optimizers", "transformer_engine": "transformer_engine.pytorch.optimizers"}[choice]
    fused: torch.optim.Optimizer = importlib.import_module(name).FusedAdam(
        list(groups), lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True
    )
    return fused


def set_adam_state(
    optimizer: torch.optim.Optimizer, moments: Iterable[tuple[Tensor, dict[str, Tensor]]], num_steps: int
) -> None:
    """Let each (tensor, its moments) be what the optimizer works on, after `num_steps` steps."""
    if isinstance(optimizer, torch.optim.AdamW):
        for tensor, named in moments:
            step = torch.tensor(float(num_steps), dtype=torch.float32, device=tensor.device)
            optimizer.state[tensor] = {"step": step, **named}
        return
    for group in optimizer.param_groups:
        group["step"] = num_steps  # both count the steps of a whole group
    for tensor, named in moments:
        optimizer.state[tensor] = dict(named)
