"""Changes the padding of the vocabulary: rows after the last id are dropped, or initialized as in a new model."""

from dataclasses import replace

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.transformed import Copy, Normal, Recipe, Segment, TransformedCheckpoint, Zeros, copied
from megatron_tf.config import ModelConfig, parse_config, to_dict
from megatron_tf.tokenformer.parameters import Parameter, model_parameters


def pad_vocabulary(source: Checkpoint, multiple: int) -> TransformedCheckpoint:
    """Return the checkpoint with its vocabulary padded to a `multiple`; the rows of real ids do not change.

    Padded rows are not masked in the loss, so changing them changes it slightly. Raises ConfigError if the multiple is
    too large.
    """
    keys = {**to_dict(source.record.model), "make_vocab_size_divisible_by": multiple}
    model = parse_config(ModelConfig, keys, str(source.directory))
    padded = model_parameters(model)
    recipes: dict[str, dict[str, Recipe]] = {}
    for group in source.groups():
        names = [parameter.name for parameter in held_parameters(source, group)]
        recipes[group] = {name: _recipe(source, group, padded[name]) for name in names}
    record = source.record.with_model(model)
    if record.generations is not None:
        sizes = {name: parameter.shape[0] for name, parameter in padded.items()}
        record = replace(record, generations=record.generations.resized(sizes))
    return TransformedCheckpoint(source, recipes, record)


def _recipe(source: Checkpoint, group: str, parameter: Parameter) -> Recipe:
    """Build the recipe of a tensor; only those over the vocabulary have other rows than before."""
    whole = copied(source, group, parameter.name)
    old, rows = whole.shape[0], parameter.shape[0]
    if rows <= old:
        return Recipe(whole.dtype, whole.columns, [Copy(parameter.name, 0, rows)])
    new: Segment = Zeros(rows - old)
    if group == "model":
        new = Normal(parameter.name, seed=source.record.seed, start=old, stop=rows, std=parameter.initial.std)
    return Recipe(whole.dtype, whole.columns, [*whole.segments, new])
