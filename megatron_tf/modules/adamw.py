"""AdamW for parameters whose rows have different histories, as growth leaves them."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_tf.checkpoint.generations import Generation, Run
from megatron_tf.checkpoint.json_object import JsonObject
from megatron_tf.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
RUNS = "generations"
"""Key of a parameter's state: its runs, rows of the same generation, in row order."""
_UNSUPPORTED = ("amsgrad", "capturable", "differentiable")


@dataclass
class _Rows:
    """Rows of one generation, of all parameters of a group: the arguments of torch's functional AdamW."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)


class GrownAdamW(torch.optim.AdamW):
    """An AdamW that treats rows by their generation, which has its own counts of updates and learning-rate factors.

    `megatron_tf.grow` makes it from a torch.optim.AdamW. Its parameter groups, whose "lr" schedulers set, and its
    options are those of AdamW. A parameter without generations is updated as by AdamW, also one that is added later or
    whose state comes from an AdamW's `state_dict()`. Rows whose learning-rate scale is 0 don't change, but their
    gradients count where gradients are clipped by a norm.

    Raises UserError for amsgrad, capturable and differentiable, which do not know generations.
    """

    def __init__(self, params: Any, *args: Any, **keys: Any) -> None:
        super().__init__(params, *args, **keys)
        # a GradScaler then unscales gradients and skips steps itself: counts on the host can't follow the fused kernel
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as to any optimizer."""
        super().add_param_group(param_group)
        _check_options(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the loss that `closure` computes, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            by_generation: dict[Generation, _Rows] = {}
            for parameter in trained:
                self._collect(parameter, by_generation)
            for generation, rows in by_generation.items():
                if not generation.is_frozen:
                    _update(rows, generation, group)
            self._count(trained)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state as of any optimizer, with the generations as plain numbers."""
        packed = super().state_dict()
        states = {}
        for index, state in packed["state"].items():
            states[index] = dict(state)
            if RUNS in state:
                states[index][RUNS] = [{"rows": run.count, **asdict(run.generation)} for run in state[RUNS]]
        return {**packed, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that was returned by `state_dict`, here or of a torch.optim.AdamW.

        Raises CheckpointError if its generations are invalid or do not fit the parameters.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            _check_options(group)
        for parameter, state in self.state.items():
            if RUNS in state:
                state[RUNS] = _read_runs(state[RUNS], parameter)

    def runs(self, parameter: Tensor) -> tuple[Run, ...]:
        """Return the runs of a parameter, in row order."""
        state = self.state[parameter]
        return state[RUNS] if RUNS in state else original_runs(parameter, int(state["step"]))

    def _collect(self, parameter: Tensor, by_generation: dict[Generation, _Rows]) -> None:
        """Sort the rows of a parameter by generation."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        assert parameter.grad is not None
        tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        runs = self.runs(parameter)
        sizes = [run.count for run in runs]
        for run, *parts in zip(runs, *(_split(tensor, sizes) for tensor in tensors), strict=True):
            rows = by_generation.setdefault(run.generation, _Rows())
            for collected, part in zip(vars(rows).values(), parts, strict=True):
                collected.append(part)

    def _count(self, trained: Iterable[Tensor]) -> None:
        """Count an update of these parameters."""
        advanced: dict[Generation, Generation] = {}  # most parameters share a few generations
        for parameter in trained:
            state = self.state[parameter]
            state["step"] += 1
            if RUNS not in state:
                continue
            for run in state[RUNS]:
                if run.generation not in advanced:
                    advanced[run.generation] = run.generation.advanced()
            state[RUNS] = tuple(Run(run.count, advanced[run.generation]) for run in state[RUNS])


def original_runs(parameter: Tensor, steps: int) -> tuple[Run, ...]:
    """Return the runs of a parameter that has not grown and has been updated this many times."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return (Run(rows, Generation(exp_avg_steps=steps, exp_avg_sq_steps=steps)),)


def _check_options(group: dict[str, Any]) -> None:
    """Raise UserError if a parameter group has an option that generations don't work with."""
    if given := [key for key in _UNSUPPORTED if group[key]]:
        raise UserError(f"{', '.join(given)}: an optimizer of a grown model has no such option; build AdamW without it")


def _update(rows: _Rows, generation: Generation, group: dict[str, Any]) -> None:
    """Run torch's AdamW on rows of one generation."""
    beta1, beta2 = group["betas"]
    lr, weight_decay = generation.rates(group["lr"], group["weight_decay"], beta1=beta1)
    # torch adds 1 to each, so they can't share memory; its fused kernels read them on the device
    device = rows.params[0].device if group["fused"] else torch.device("cpu")
    counts = torch.full((len(rows.params),), float(generation.exp_avg_sq_steps), device=device)
    adamw(
        **vars(rows),
        max_exp_avg_sqs=[],
        state_steps=list(counts.unbind()),
        foreach=group["foreach"],
        fused=group["fused"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _split(tensor: Tensor, sizes: list[int]) -> Iterable[Tensor]:
    return tensor.split(sizes) if len(sizes) > 1 else (tensor,)


def _read_runs(entries: list[dict[str, Any]], parameter: Tensor) -> tuple[Run, ...]:
    """Read the runs of a parameter from the state of an optimizer."""
    values = [JsonObject("the optimizer's state_dict", RUNS, entry) for entry in entries]
    runs = tuple(Run(entry.count("rows"), Generation.from_json(entry)) for entry in values)
    if sum(run.count for run in runs) != len(parameter):
        raise UserError(
            f"the optimizer's state_dict is of another model: its generations cover {sum(run.count for run in runs)} "
            f"rows of a parameter {list(parameter.shape)}"
        )
    return runs
