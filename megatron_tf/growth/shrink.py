"""Shrinks a checkpoint by dropping parameter tokens, or hidden units of a plain transformer's MLP.

The others keep their values, Adam moments, generations and order. A unit contributes P_j V_j to its module's output (a
hidden unit gelu(u_j) w_j), and a token A_j^2, or gelu(A_j)^2, to the norm of the row. Units with zero keys contribute
to neither, and hidden units with zero values to nothing, so dropping them is exact and undoes an untrained growth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generations, Run
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.transformed import Copy, Recipe, TransformedCheckpoint, copied
from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.parameters import Parameter, model_parameters

Kept = Mapping[str, Sequence[int]]
"""Path of a Pattention or MLP -> indices of the units to keep, in increasing order."""


def keep_most_important(
    model: ModelConfig, importance: Mapping[str, Tensor], units: Mapping[str, int]
) -> dict[str, list[int]]:
    """Select the `units[kind]` tokens or hidden units of each module with the highest `importance` [N].

    Ties keep the first. Raises CheckpointError if the model has no units of a kind, if a module has fewer than that, or
    if none has more.
    """
    kinds = _kinds(model)
    kept = {}
    for kind, count in units.items():
        modules = [path for path, own in kinds.items() if own == kind]
        if not modules:
            raise CheckpointError(f"--shrink {kind}={count}: a model with layer: {model.layer} has no {kind} tokens")
        for module in modules:
            kept[module] = _most_important(importance[module], kind, count=count, module=module)
        if all(len(importance[module]) == count for module in modules):
            raise _too_few(kind, count, modules[0], has=count)
    return kept


def _most_important(importance: Tensor, kind: str, *, count: int, module: str) -> list[int]:
    if count > len(importance):
        raise _too_few(kind, count, module, has=len(importance))
    if not importance.isfinite().all():
        raise CheckpointError(f"--shrink: {module} has infinite or NaN contributions: its tokens can't be ranked")
    order = torch.argsort(importance, descending=True, stable=True)
    return sorted(order[:count].tolist())


def _too_few(kind: str, count: int, module: str, *, has: int) -> CheckpointError:
    return CheckpointError(f"--shrink {kind}={count}: {module} has only {has} tokens")


def _kinds(model: ModelConfig) -> dict[str, str]:
    """Return the kind of every Pattention and MLP by module path."""
    return {each.units_path: each.kind for each in model_parameters(model).values() if each.has_units}


def shrink(source: Checkpoint, kept: Kept) -> TransformedCheckpoint:
    """Return the checkpoint with only the `kept` units; modules missing from `kept` keep all of theirs."""
    recipes: dict[str, dict[str, Recipe]] = {}
    for group in source.groups():
        recipes[group] = {}
        for parameter in held_parameters(source, group):
            recipes[group][parameter.name] = _recipe(source, group, parameter, kept=kept)
    return TransformedCheckpoint(source, recipes, _record(source.record, kept))


def _recipe(source: Checkpoint, group: str, parameter: Parameter, *, kept: Kept) -> Recipe:
    whole = copied(source, group, parameter.name)
    if not parameter.has_units or parameter.units_path not in kept:
        return whole
    runs = _ranges(kept[parameter.units_path])
    return Recipe(whole.dtype, whole.columns, [Copy(parameter.name, *run) for run in runs])


def _ranges(places: Sequence[int]) -> list[tuple[int, int]]:
    """Merge consecutive indices into ranges [start, stop)."""
    ranges = [(places[0], places[0] + 1)]
    for place in places[1:]:
        start, stop = ranges[-1]
        if place == stop:
            ranges[-1] = start, place + 1
        else:
            ranges.append((place, place + 1))
    return ranges


def _record(record: RunRecord, kept: Kept) -> RunRecord:
    kinds = _kinds(record.model)
    counts = {kinds[module]: len(places) for module, places in kept.items()}
    changes: dict[str, Any] = {f"{kind}_tokens": count for kind, count in counts.items()}
    after = record.after_growth(
        replace(record.model, **changes),
        kinds={kind: [getattr(record.model, f"{kind}_tokens"), count] for kind, count in counts.items()},
        init="shrink",
    )
    return after.with_generations(_generations(record, kept))


def _generations(record: RunRecord, kept: Kept) -> Generations:
    """Return the generations of the remaining rows."""
    runs = {}
    for parameter in model_parameters(record.model).values():
        old = record.all_generations.runs(parameter.name, parameter.shape[0])
        if parameter.has_units and parameter.units_path in kept:
            of_row = [run.generation for run in old for _ in range(run.count)]
            old = [Run(1, of_row[place]) for place in kept[parameter.units_path]]
        runs[parameter.name] = old
    return Generations.of_runs(runs)
