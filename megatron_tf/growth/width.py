"""Grows the width of a checkpoint while preserving the model's outputs, by an integer or by 1.5.

The residual stream h becomes C h with a matrix C [D', D] whose rows sum to one and whose columns are orthogonal with
the square norm D' / D. A layer norm without parameters then gives C times what it gave: mean and variance are the same.
So does an RMSNorm with weights if C makes copies, with which its weights are copied.
`integer_width` and `uneven_width` say which C, and what it makes of each tensor.
"""

from dataclasses import replace

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generations
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.transformed import Recipe, TransformedCheckpoint
from megatron_tf.config import UNEVEN_MULTIPLE, GrowthStage, ModelConfig, widened_model
from megatron_tf.growth.integer_width import IntegerWidth
from megatron_tf.growth.parts import Part, PartMaker
from megatron_tf.growth.uneven_width import UnevenWidth
from megatron_tf.growth.widening import Widening
from megatron_tf.tokenformer.parameters import Parameter, model_parameters


def widen(source: Checkpoint, stage: GrowthStage) -> TransformedCheckpoint:
    """Return the checkpoint with `stage.hidden_multiple` times the width; its lineage does not mention it yet.

    Raises ConfigError if the width can't grow like this, CheckpointError if the source is inconsistent.
    """
    record = source.record
    assert stage.hidden_multiple is not None
    wide = widened_model(record.model, stage.hidden_multiple)
    new = model_parameters(wide)
    parts = _parts(record, stage, new=new)
    recipes: dict[str, dict[str, Recipe]] = {}
    for group in source.groups():
        recipes[group] = {}
        for old in held_parameters(source, group):
            _check_shape(source, group, old)
            segments = [part.segments[group] for part in parts[old.name]]
            recipes[group][old.name] = Recipe(source.dtype(group, old.name), new[old.name].shape[1:], segments)
    runs = {name: [run for part in parts[name] for run in part.runs] for name in new}
    after = _record(record, wide, stage).with_generations(Generations.of_runs(runs))
    return TransformedCheckpoint(source, recipes, after)


def _parts(record: RunRecord, stage: GrowthStage, *, new: dict[str, Parameter]) -> dict[str, list[Part]]:
    maker = PartMaker(stage, len(record.lineage) + 1)
    stream = f"growth.{len(record.lineage)}.width"
    kind: type[Widening] = UnevenWidth if stage.hidden_multiple == UNEVEN_MULTIPLE else IntegerWidth
    width = kind(maker=maker, generations=record.all_generations, seed=record.seed, stream=stream)
    return {name: width.parts(old, new[name]) for name, old in model_parameters(record.model).items()}


def _check_shape(source: Checkpoint, group: str, old: Parameter) -> None:
    """Raise CheckpointError if a tensor has another shape than the metadata says."""
    shape = source.shape(group, old.name)
    if shape != old.shape:
        raise CheckpointError(f"{group} {old.name} is {list(shape)}, the checkpoint's metadata says {list(old.shape)}")


def _record(record: RunRecord, wide: ModelConfig, stage: GrowthStage) -> RunRecord:
    training = record.training
    if stage.hidden_multiple == UNEVEN_MULTIPLE:  # all moments restart, and the bias correction with them
        training = replace(training, adam_steps=0)
    return replace(record.with_model(wide), training=training)
