"""Another padding of the vocabulary: rows after the last id are dropped, or drawn as in a new model."""

import dataclasses

from megatron_tf.checkpoint.contents import held_parameters, model_of
from megatron_tf.checkpoint.derived import (
    Checkpoint,
    Copy,
    DerivedCheckpoint,
    Normal,
    Recipe,
    Segment,
    Zeros,
    copied,
    with_model,
)
from megatron_tf.tokenformer.parameters import Parameter, model_parameters


def pad_vocabulary(source: Checkpoint, multiple: int) -> DerivedCheckpoint:
    """The checkpoint with its vocabulary padded to a `multiple`; the rows of real ids stay as they are.

    Padded rows are not masked in the loss, so that other ones move it a little.
    """
    padded = model_parameters(dataclasses.replace(model_of(source), make_vocab_size_divisible_by=multiple))
    recipes: dict[str, dict[str, Recipe]] = {}
    for group in source.groups():
        names = [parameter.name for parameter in held_parameters(source, group)]
        recipes[group] = {name: _recipe(source, group, padded[name]) for name in names}
    metadata = with_model(source.metadata, {"make_vocab_size_divisible_by": multiple})
    return DerivedCheckpoint(source, recipes, metadata)


def _recipe(source: Checkpoint, group: str, parameter: Parameter) -> Recipe:
    """Of a tensor of the model with the new padding; only those of the vocabulary have other rows."""
    whole = copied(source, group, parameter.name)
    old, rows = whole.shape[0], parameter.shape[0]
    if rows <= old:
        return Recipe(whole.dtype, whole.columns, [Copy(parameter.name, 0, rows)])
    new: Segment = Zeros(rows - old)
    if group == "model":
        seed = source.metadata["config"]["training"]["seed"]
        new = Normal(parameter.name, seed, old, rows, parameter.initial.std)
    return Recipe(whole.dtype, whole.columns, [*whole.segments, new])
