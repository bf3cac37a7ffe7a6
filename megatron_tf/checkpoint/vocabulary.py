"""Another padding of the vocabulary: rows after the last id are dropped, or drawn as at birth."""

from megatron_tf.checkpoint.derived import (
    Checkpoint,
    Copy,
    DerivedCheckpoint,
    Normal,
    Recipe,
    Segment,
    Zeros,
    copied,
)
from megatron_tf.config import ModelConfig, parse_config, to_dict

_TENSORS = ("embedding.weight", "head.weight")


def pad_vocabulary(source: Checkpoint, multiple: int) -> DerivedCheckpoint:
    """The checkpoint with its vocabulary padded to a `multiple`; the rows of real ids stay as they are.

    Padded rows are not masked in the loss, so that other ones move it a little. Raises ConfigError for a multiple that
    is too large.
    """
    keys = {**to_dict(source.record.model), "make_vocab_size_divisible_by": multiple}
    model = parse_config(ModelConfig, keys, str(source.directory))
    rows = model.padded_vocab_size
    recipes = {
        group: {
            name: _recipe(source, group, name, rows) if name in _TENSORS else copied(source, group, name)
            for name in source.names(group)
        }
        for group in source.groups()
    }
    return DerivedCheckpoint(source, recipes, source.record.with_model(model))


def _recipe(source: Checkpoint, group: str, name: str, rows: int) -> Recipe:
    whole = copied(source, group, name)
    old = whole.shape[0]
    if rows <= old:
        return Recipe(whole.dtype, whole.columns, [Copy(name, 0, rows)])
    new: Segment = Zeros(rows - old)
    if group == "model":
        new = Normal(name, source.record.seed, old, rows, source.record.model.init_method_std)
    return Recipe(whole.dtype, whole.columns, [*whole.segments, new])
