"""Growth of a module and of its optimizer between two steps of a training loop."""

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import LAYOUT_KEYS, GrowthStage, layer_sources, parse_config
from megatron_tf.errors import UserError
from megatron_tf.growth.grow import grow as grow_checkpoint
from megatron_tf.growth.parts import MODEL
from megatron_tf.growth.utility import measure_utility, needs_utility
from megatron_tf.model.from_checkpoint import fill
from megatron_tf.modules.adamw import MOMENTS, RUNS, GrownAdamW
from megatron_tf.modules.in_memory import of_module
from megatron_tf.modules.tokenformer import TokenFormer
from megatron_tf.tokenformer.parameters import Parameter, model_parameters

_OF_RUNS = ("optimizer", *LAYOUT_KEYS)
"""Keys of a stage that only a run can apply."""


@overload
def grow(model: TokenFormer, stage: GrowthStage | Mapping[str, Any]) -> TokenFormer: ...


@overload
def grow(
    model: TokenFormer, stage: GrowthStage | Mapping[str, Any], optimizer: torch.optim.AdamW
) -> tuple[TokenFormer, GrownAdamW]: ...


def grow(
    model: TokenFormer, stage: GrowthStage | Mapping[str, Any], optimizer: torch.optim.AdamW | None = None
) -> TokenFormer | tuple[TokenFormer, GrownAdamW]:
    """Return the grown module, and with an `optimizer` one for it, whose state continues that of the old rows.

    `stage` is a stage of growth, or a mapping of its keys as in a configuration; the caller decides when it is due, so
    at_step and at_tokens are not read. Values are those that reshard-checkpoint and a run that grows compute, to the
    bit. The module is a new one on the same device with the same types; `model` and `optimizer` do not change, and
    gradients are not copied. New layers join the parameter groups of their neighbors. Learning-rate schedulers are to
    be built again, for the new optimizer.

    Raises UserError, naming the key and the number, if the model can't grow like this; also for an optimizer of
    another class, or with parameters that are not those of `model`.
    """
    stage = _read_stage(stage)
    if type(model) is not TokenFormer:
        raise UserError(
            f"grow takes a megatron_tf.TokenFormer, as megatron_tf.load returns, not {type(model).__name__}: pass the "
            f"module within it"
        )
    if optimizer is not None:
        _check_optimizer(model, optimizer)
    source = of_module(model, optimizer)
    utility = measure_utility(source, stage) if needs_utility(stage) else None
    checkpoint = grow_checkpoint(source, stage, utility=utility)
    templates = _templates(model, checkpoint.record, stage)
    grown = _grown_module(model, checkpoint, templates)
    if optimizer is None:
        return grown
    return grown, _grown_optimizer(optimizer, model, checkpoint, grown=grown, templates=templates)


def _read_stage(stage: GrowthStage | Mapping[str, Any]) -> GrowthStage:
    if not isinstance(stage, GrowthStage):
        stage = parse_config(GrowthStage, dict(stage), "stage")
    if given := [key for key in _OF_RUNS if getattr(stage, key) is not None]:
        raise UserError(f"stage: {', '.join(given)} is for runs: remove it")
    return stage


def _check_optimizer(model: TokenFormer, optimizer: torch.optim.AdamW) -> None:
    if type(optimizer) not in (torch.optim.AdamW, GrownAdamW):
        raise UserError(
            f"the optimizer is {type(optimizer).__name__}: only the state of a torch.optim.AdamW has rules of growth; "
            f"grow without it, and build another one for the grown module"
        )
    known = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise UserError(
                    f"parameter group {number} of the optimizer has a parameter {list(parameter.shape)} that is not "
                    f"one of the model: give it an optimizer of its own"
                )


def _templates(model: TokenFormer, record: RunRecord, stage: GrowthStage) -> dict[str, str]:
    """Return the old parameter that each parameter of the grown model continues or copies, or whose neighbor it is."""
    layers = layer_sources(model.config.num_layers, stage)

    def template(parameter: Parameter) -> str:
        return parameter.name if parameter.layer is None else parameter.name_in_layer(layers[parameter.layer].layer)

    return {name: template(parameter) for name, parameter in model_parameters(record.model).items()}


def _grown_module(model: TokenFormer, checkpoint: Checkpoint, templates: Mapping[str, str]) -> TokenFormer:
    record = checkpoint.record
    grown = TokenFormer(record.model, device="meta", dtype=model.transformer.dtype)
    fill(grown.transformer, lambda parameter: _tensor(checkpoint, MODEL, parameter.name).to(model.device), record.tau)
    old = dict(model.transformer.named_parameters())
    for name, parameter in grown.transformer.named_parameters():
        parameter.requires_grad_(old[templates[name]].requires_grad)
    grown.record = _without_state(record)
    grown.directory = model.directory
    return grown.train(model.training)


def _without_state(record: RunRecord) -> RunRecord:
    """Return the record of a module alone, as its optimizer counts the updates."""
    return record.with_generations(record.all_generations.without_state())


def _grown_optimizer(
    optimizer: torch.optim.AdamW,
    model: TokenFormer,
    checkpoint: Checkpoint,
    *,
    grown: TokenFormer,
    templates: Mapping[str, str],
) -> GrownAdamW:
    """Return the optimizer of the grown module, with the parameter groups of the old one."""
    places = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    old = dict(model.transformer.named_parameters())
    groups: list[dict[str, Any]] = [
        # names, which an optimizer may keep, would be those of the old parameters
        {key: value for key, value in group.items() if key != "param_names"} | {"params": []}
        for group in optimizer.param_groups
    ]
    new = dict(grown.transformer.named_parameters())
    for name, parameter in new.items():
        number = places.get(id(old[templates[name]]))
        if number is not None:
            groups[number]["params"].append(parameter)
    result = GrownAdamW(groups)
    result.defaults = dict(optimizer.defaults)
    for name in checkpoint.names(MOMENTS[0]):
        result.state[new[name]] = _state(checkpoint, name, new[name])
    return result


def _state(checkpoint: Checkpoint, name: str, parameter: Tensor) -> dict[str, Any]:
    runs = tuple(checkpoint.record.all_generations.runs(name, len(parameter)))
    steps = max(run.generation.exp_avg_sq_steps for run in runs)
    moments = {moment: _tensor(checkpoint, moment, name).to(parameter.device) for moment in MOMENTS}
    return {"step": torch.tensor(float(steps)), **moments, RUNS: runs}


def _tensor(checkpoint: Checkpoint, group: str, name: str) -> Tensor:
    return checkpoint.read_rows(group, name, start=0, stop=checkpoint.shape(group, name)[0])
