"""Shrinking a checkpoint: parameter tokens are dropped, the others stay as they are and in their order.

A token contributes P_j V_j to its module's output, and A_j^2 (or gelu(A_j)^2) to the norm of the row. Tokens with zero
keys contribute to neither: to drop them is exact, and undoes a growth by them that was not trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import GrowthEvent, RunRecord
from megatron_tf.checkpoint.transformed import Copy, Recipe, TransformedCheckpoint, copied
from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.parameters import Parameter, key_tokens

Kept = Mapping[str, Sequence[int]]
"""Path of a module -> places of the tokens that stay, in order."""


def keep_most_important(
    model: ModelConfig, importance: Mapping[str, Tensor], tokens: Mapping[str, int]
) -> dict[str, list[int]]:
    """For each module, `importance` [N] of its tokens -> the places of the `tokens[kind]` largest; the first of equals.

    Raises CheckpointError where a module has no more tokens than that.
    """
    kept = {}
    keys = key_tokens(model)
    for module, values in importance.items():
        kind = keys[module].kind
        if kind not in tokens:
            continue
        count = tokens[kind]
        if count >= len(values):
            raise CheckpointError(f"--shrink {kind}={count}: {module} has {len(values)} tokens only")
        if not values.isfinite().all():
            raise CheckpointError(f"--shrink: {module} contributes infinite or NaN values: its tokens have no order")
        order = torch.argsort(values, descending=True, stable=True)
        kept[module] = sorted(order[:count].tolist())
    return kept


def shrink(source: Checkpoint, kept: Kept) -> TransformedCheckpoint:
    """The checkpoint with the tokens of `kept` only; modules that are not in it stay whole."""
    recipes: dict[str, dict[str, Recipe]] = {}
    for group in source.groups():
        recipes[group] = {}
        for parameter in held_parameters(source, group):
            recipes[group][parameter.name] = _recipe(source, group, parameter, kept=kept)
    return TransformedCheckpoint(source, recipes, _record(source, kept))


def _recipe(source: Checkpoint, group: str, parameter: Parameter, *, kept: Kept) -> Recipe:
    whole = copied(source, group, parameter.name)
    if not parameter.is_token or parameter.path not in kept:
        return whole
    return Recipe(whole.dtype, whole.columns, [Copy(parameter.name, *run) for run in _runs(kept[parameter.path])])


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Join neighbouring places to ranges [start, stop)."""
    runs = [(places[0], places[0] + 1)]
    for place in places[1:]:
        start, stop = runs[-1]
        if place == stop:
            runs[-1] = start, place + 1
        else:
            runs.append((place, place + 1))
    return runs


def _record(source: Checkpoint, kept: Kept) -> RunRecord:
    record = source.record
    keys = key_tokens(record.model)
    counts = {keys[module].kind: len(places) for module, places in kept.items()}
    event = GrowthEvent(
        step=record.training.step,
        samples=record.training.samples,
        tokens=record.training.tokens,
        kinds={kind: [getattr(record.model, f"{kind}_tokens"), count] for kind, count in counts.items()},
        init="shrink",
        seed=record.seed,
    )
    changes: dict[str, Any] = {f"{kind}_tokens": count for kind, count in counts.items()}
    return replace(
        record.with_model(replace(record.model, **changes)),
        lineage=(*record.lineage, event),
        after_growth=None,
        growth_stage=None,
    )
