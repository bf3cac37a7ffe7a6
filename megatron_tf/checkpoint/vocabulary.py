"""Another padding of the vocabulary: rows after the last id are dropped, or drawn as in a new model."""

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.transformed import Copy, Normal, Recipe, Segment, TransformedCheckpoint, Zeros, copied
from megatron_tf.config import ModelConfig, parse_config, to_dict
from megatron_tf.tokenformer.parameters import Parameter, model_parameters


def pad_vocabulary(source: Checkpoint, multiple: int) -> TransformedCheckpoint:
    """The checkpoint with its vocabulary padded to a `multiple`; the rows of real ids stay as they are.

    Padded rows are not masked in the loss, so that other ones move it a little. Raises ConfigError for a multiple that
    is too large.
    """
    keys = {**to_dict(source.record.model), "make_vocab_size_divisible_by": multiple}
    model = parse_config(ModelConfig, keys, str(source.directory))
    padded = model_parameters(model)
    recipes: dict[str, dict[str, Recipe]] = {}
    for group in source.groups():
        names = [parameter.name for parameter in held_parameters(source, group)]
        recipes[group] = {name: _recipe(source, group, padded[name]) for name in names}
    return TransformedCheckpoint(source, recipes, source.record.with_model(model))


def _recipe(source: Checkpoint, group: str, parameter: Parameter) -> Recipe:
    """Of a tensor of the model with the new padding; only those of the vocabulary have other rows."""
    whole = copied(source, group, parameter.name)
    old, rows = whole.shape[0], parameter.shape[0]
    if rows <= old:
        return Recipe(whole.dtype, whole.columns, [Copy(parameter.name, 0, rows)])
    new: Segment = Zeros(rows - old)
    if group == "model":
        new = Normal(parameter.name, seed=source.record.seed, start=old, stop=rows, std=parameter.initial.std)
    return Recipe(whole.dtype, whole.columns, [*whole.segments, new])
