"""Takes back a growth in width by merging the m copies that the residual stream and the heads consist of.

A weight that reads the stream is the sum of its copies, in which their noise cancels; one that writes it is their mean.
That undoes an untrained growth. After training, copies differ, and the result is a narrower model to start from. Adam
moments are merged by the inverse rules: the gradient of the narrower model is the mean of the copies' gradients where
it reads, and their sum where it writes.
"""

from dataclasses import replace
from fractions import Fraction

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generations, Run
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.transformed import Merged, Recipe, TransformedCheckpoint
from megatron_tf.config import ModelConfig
from megatron_tf.growth.axes import Axis, axes_of, scales_of
from megatron_tf.growth.parts import FIRST, MODEL, SECOND, rows_of
from megatron_tf.tokenformer.parameters import Parameter, model_parameters


def divide_width(source: Checkpoint, copies: int) -> TransformedCheckpoint:
    """Return the checkpoint with 1 / `copies` of the width and of the heads.

    Raises CheckpointError if they are not divisible, or if the lineage has no growth in width by a multiple of this.
    """
    record = source.record
    narrow = _narrower(record, copies)
    new = model_parameters(narrow)
    recipes: dict[str, dict[str, Recipe]] = {}
    for group in source.groups():
        recipes[group] = {}
        for old in held_parameters(source, group):
            segment = _merged(new[old.name], old, group=group, copies=copies)
            recipes[group][old.name] = Recipe(source.dtype(group, old.name), new[old.name].shape[1:], [segment])
    return TransformedCheckpoint(source, recipes, _record(record, narrow, copies))


def _narrower(record: RunRecord, copies: int) -> ModelConfig:
    """Return the model after the division."""
    model, what = record.model, f"--divide-hidden {copies}"
    if copies < 2:
        raise CheckpointError(f"{what}: give the number of copies to merge, 2 or more")
    for key in ("hidden_size", "num_attention_heads"):
        if (value := getattr(model, key)) % copies:
            raise CheckpointError(f"{what}: {key} is {value}, which is not divisible by {copies}")
    grown = _copies_in(record)
    if grown % copies:
        raise CheckpointError(
            f"{what}: by its lineage the model's width consists of {grown} equal part(s), and only copies that growth "
            f"with hidden_multiple made can be merged"
        )
    return replace(
        model, hidden_size=model.hidden_size // copies, num_attention_heads=model.num_attention_heads // copies
    )


def _copies_in(record: RunRecord) -> int:
    """Return how many copies the width consists of by the lineage."""
    copies = Fraction(1)
    for event in record.lineage:
        if event.hidden_size is not None:
            old, new = event.hidden_size
            is_uneven = new % old and old % new  # mixes channels and repeats heads unevenly
            copies = Fraction(1) if is_uneven else copies * Fraction(new, old)
    return int(copies)


def _merged(new: Parameter, old: Parameter, *, group: str, copies: int) -> Merged:
    axes = axes_of(old)
    num_axes = sum(axis is not Axis.UNITS for axis in axes)
    forward = scales_of(axes, copies)
    # the merged tensor is the mean of its copies, divided by the factor that each of them was made with
    factor = {MODEL: forward.value, FIRST: forward.gradient, SECOND: forward.gradient**2}[group]
    row_copies, *column_copies = [1 if axis is Axis.UNITS else copies for axis in axes]
    return Merged(
        name=old.name,
        count=new.shape[0],
        row_copies=row_copies,
        column_copies=column_copies[0] if column_copies else 1,
        scale=1 / (factor * copies**num_axes),
    )


def _record(record: RunRecord, narrow: ModelConfig, copies: int) -> RunRecord:
    widths = [record.model.hidden_size, narrow.hidden_size]
    after = record.after_growth(narrow, kinds={}, init="divide_hidden", hidden_size=widths)
    if record.generations is None:
        return after
    runs = {}
    old = model_parameters(record.model)
    for name, parameter in model_parameters(narrow).items():
        wide = record.generations.runs(name, old[name].shape[0])
        scale = scales_of(axes_of(parameter), copies).step
        runs[name] = [_unscaled(run, scale) for run in rows_of(wide, 0, parameter.shape[0])]
    return after.with_generations(Generations.of_runs(runs))


def _unscaled(run: Run, scale: float) -> Run:
    """Return the run without the step `scale` of copies, if it has one: a growth with `step_scale: none` set none."""
    step_scale = min(1.0, run.generation.step_scale / scale)
    return Run(run.count, replace(run.generation, step_scale=step_scale))
