"""AdamW of torch, apex and transformer-engine behind one signature; torch's is the reference."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_tf.kernels.adapters import optimizer_module

_CHUNK = 1 << 22  # elements of tensors whose changes are computed together: 16 MB in fp32, twice


def adamw(
    choice: str, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Build AdamW over groups of plain tensors: torch's fused one, or FusedAdam of apex or transformer-engine.

    Fill its state through `set_adam_state`: the implementations store it differently.
    """
    if choice == "torch":
        return torch.optim.AdamW(list(groups), lr=lr, betas=betas, eps=eps, fused=True)
    fused: torch.optim.Optimizer = optimizer_module(choice).FusedAdam(
        list(groups), lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True
    )
    return fused


def set_adam_state(
    optimizer: torch.optim.Optimizer, moments: Mapping[Tensor, dict[str, Tensor]], counts: Sequence[int]
) -> None:
    """Set the Adam moments of each tensor, by name, and the number of updates that each parameter group counts."""
    for group, count in zip(optimizer.param_groups, counts, strict=True):
        if not isinstance(optimizer, torch.optim.AdamW):
            group["step"] = count  # both others count the updates of a whole group
        for tensor in group["params"]:
            if tensor not in moments:
                continue  # stands for no rows
            state = dict(moments[tensor])
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(float(count), dtype=torch.float32, device=tensor.device)
            optimizer.state[tensor] = state


@torch.no_grad()
def norms_of_changes(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], tensors: Sequence[Tensor], *, count: int
) -> list[Tensor]:
    """Compute the norm of what AdamW's last step added to each of these tensors of a parameter group.

    It follows from the tensors and their Adam moments after the step, so that no copy from before it is needed. `count`
    is the number of updates that the second moments have accumulated. Does not wait for the device.
    """
    first, second = (1 - beta**count for beta in group["betas"])
    lr, decay = group["lr"], group["lr"] * group["weight_decay"]
    norms: list[Tensor] = []
    for chunk in _chunks(tensors):
        exp_avg, exp_avg_sq = ([optimizer.state[each][key] for each in chunk] for key in ("exp_avg", "exp_avg_sq"))
        # private, but used by torch's own optimizers: one kernel for many tensors instead of one for each
        denominators = torch._foreach_div(exp_avg_sq, second)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        changes = torch._foreach_div(exp_avg, denominators)
        torch._foreach_mul_(changes, lr / first)
        # the step took p to q = (1 - decay) p - change, so that p - q = (change + decay q) / (1 - decay)
        torch._foreach_add_(changes, chunk, alpha=decay)
        torch._foreach_div_(changes, 1 - decay)
        norms += torch._foreach_norm(changes)
    return norms


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split tensors into lists of about `_CHUNK` elements, or of one tensor if it has more."""
    chunk: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if chunk and size + tensor.numel() > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += tensor.numel()
    if chunk:
        yield chunk
