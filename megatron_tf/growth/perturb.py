"""Shrink and perturb (arXiv 2605.13405): scale the old weights down after a growth, and add noise to them.

The outputs change. Under `l2_norm_gelu` the norm of a row cancels a scale common to all keys of a module, so shrinking
acts on its values, and on its keys only relative to new ones. `gelu_l2_norm` and softmax do not cancel it.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_tf.checkpoint.transformed import Copy, Normal, Segment, TransformedCheckpoint, Zeros, copied
from megatron_tf.config import GrowthStage
from megatron_tf.growth.parts import MODEL
from megatron_tf.tokenformer.parameters import model_parameters


def shrink_and_perturb(grown: TransformedCheckpoint, stage: GrowthStage, *, stream: str) -> TransformedCheckpoint:
    """Return the grown checkpoint with the stage's `shrink_factor` and `perturb_std` applied to its old weights.

    These are the old rows, and copies of them, of every parameter with weight decay. New rows, the final norm, Adam
    moments, temperatures and generations stay. `stream` is the prefix of the random streams of this growth.
    """
    if stage.shrink_factor == 1.0 and not stage.perturb_std:
        return grown
    recipes = {group: {name: copied(grown, group, name) for name in grown.names(group)} for group in grown.groups()}
    for name, parameter in model_parameters(grown.record.model).items():
        if parameter.decays:
            segments = list(_perturbed(grown, name, stage, stream=f"{stream}.{name}.perturb"))
            recipes[MODEL][name] = replace(recipes[MODEL][name], segments=segments)
    return TransformedCheckpoint(grown, recipes, grown.record)


def _perturbed(grown: TransformedCheckpoint, name: str, stage: GrowthStage, *, stream: str) -> Iterator[Segment]:
    """Yield the rows of a tensor of the grown model, with old ones perturbed."""
    start = 0
    for segment in grown.recipes[MODEL][name].segments:
        stop = start + len(segment)
        if isinstance(segment, (Normal, Zeros)):  # new rows
            yield Copy(name, start, stop)
        else:
            noise = Normal(stream, seed=grown.record.seed, start=start, stop=stop, std=stage.perturb_std)
            yield Copy(name, start, stop, scale=stage.shrink_factor, noise=[noise] if stage.perturb_std else [])
        start = stop
