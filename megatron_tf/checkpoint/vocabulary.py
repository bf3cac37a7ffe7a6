"""Another padding of the vocabulary: rows after the last id are dropped, or drawn as at birth."""

import math

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

_TENSORS = ("embedding.weight", "head.weight")


def pad_vocabulary(source: Checkpoint, multiple: int) -> DerivedCheckpoint:
    """The checkpoint with its vocabulary padded to a `multiple`; the rows of real ids stay as they are.

    Padded rows are not masked in the loss, so that other ones move it a little.
    """
    model = source.metadata["model"]
    rows = math.ceil(model["vocab_size"] / multiple) * multiple
    recipes = {
        group: {
            name: _recipe(source, group, name, rows) if name in _TENSORS else copied(source, group, name)
            for name in source.names(group)
        }
        for group in source.groups()
    }
    metadata = with_model(source.metadata, {"make_vocab_size_divisible_by": multiple})
    return DerivedCheckpoint(source, recipes, metadata)


def _recipe(source: Checkpoint, group: str, name: str, rows: int) -> Recipe:
    whole = copied(source, group, name)
    old = whole.shape[0]
    if rows <= old:
        return Recipe(whole.dtype, whole.columns, [Copy(name, 0, rows)])
    new: Segment = Zeros(rows - old)
    if group == "model":
        config = source.metadata
        new = Normal(name, config["config"]["training"]["seed"], old, rows, config["model"]["init_method_std"])
    return Recipe(whole.dtype, whole.columns, [*whole.segments, new])
