"""Drops layers of a checkpoint; the others keep their values, optimizer state and order.

A layer whose last values (of proj and ffn) are zero is the identity, as new layers are before they are trained.
Dropping those undoes the growth that added them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generations
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.transformed import Recipe, TransformedCheckpoint, copied
from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.parameters import Parameter, key_tokens, model_parameters


def drop_layers(source: Checkpoint, layers: Sequence[int]) -> TransformedCheckpoint:
    """Return the checkpoint without `layers`, which are numbered as in `source`.

    Raises CheckpointError if one of them does not exist or is named twice, or if no layer would be left.
    """
    kept = _kept(source.record.model.num_layers, layers)
    remaining = _without(source.record.model, kept)
    old_names = {name: _old_name(parameter, kept) for name, parameter in model_parameters(remaining).items()}
    recipes: dict[str, dict[str, Recipe]] = {}
    for group in source.groups():
        held = {parameter.name for parameter in held_parameters(source, group)}
        recipes[group] = {new: copied(source, group, old) for new, old in old_names.items() if old in held}
    return TransformedCheckpoint(source, recipes, _record(source.record, remaining, kept=kept, old_names=old_names))


def _kept(num_layers: int, layers: Sequence[int]) -> list[int]:
    """Return the layers that remain, in order."""
    dropped = set(layers)
    if len(dropped) < len(layers):
        twice = next(layer for layer in layers if layers.count(layer) > 1)
        raise CheckpointError(f"--drop-layers: layer {twice} is given twice; layers are numbered as before the drop")
    if dropped and max(dropped) >= num_layers:
        raise CheckpointError(
            f"--drop-layers: there is no layer {max(dropped)}; the model has {num_layers}, numbered from 0"
        )
    if len(dropped) == num_layers:
        raise CheckpointError(f"--drop-layers: these are all {num_layers} layers of the model; keep at least one")
    return [layer for layer in range(num_layers) if layer not in dropped]


def _without(model: ModelConfig, kept: list[int]) -> ModelConfig:
    changes: dict[str, Any] = {"num_layers": len(kept)}
    for kind in model.token_kinds:
        counts = [model.token_counts(kind)[layer] for layer in kept]
        changes[f"{kind}_tokens"] = counts[0] if len(set(counts)) == 1 else counts
    return dataclasses.replace(model, **changes)


def _old_name(parameter: Parameter, kept: list[int]) -> str:
    return parameter.name if parameter.layer is None else parameter.name_in_layer(kept[parameter.layer])


def _record(record: RunRecord, remaining: ModelConfig, *, kept: list[int], old_names: dict[str, str]) -> RunRecord:
    """Return the record of the remaining layers, with the event in its lineage."""
    old = model_parameters(record.model)
    tau = {path: record.tau[old[old_names[keys.name]].path] for path, keys in key_tokens(remaining).items()}
    dropped = [layer for layer in range(record.model.num_layers) if layer not in kept]
    rest = record.after_growth(remaining, kinds={}, init="drop_layers", dropped_layers=dropped)
    rest = replace(rest, tau=tau)
    if record.generations is None:
        return rest
    runs = {new: record.generations.runs(name, old[name].shape[0]) for new, name in old_names.items()}
    return rest.with_generations(Generations.of_runs(runs))
