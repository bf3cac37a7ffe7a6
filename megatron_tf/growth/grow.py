"""Grows a checkpoint: width first, then parameter tokens and layers, and at last the old weights may be perturbed.

Every operator maps a checkpoint to another one whose rows are computed when they are read. So operators compose, a
command streams the result to files, and a run that grows reads it directly: both get the same bits.
"""

from dataclasses import replace

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generations
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.transformed import Recipe, TransformedCheckpoint
from megatron_tf.config import ConfigError, GrowthStage, ModelConfig, grown_model, layer_sources, token_init
from megatron_tf.growth.layers_and_tokens import LayersAndTokens
from megatron_tf.growth.parts import Part, PartMaker
from megatron_tf.growth.perturb import shrink_and_perturb
from megatron_tf.growth.temperatures import grown_taus
from megatron_tf.growth.utility import Utility, needs_utility
from megatron_tf.growth.width import widen
from megatron_tf.tokenformer.parameters import Parameter, model_parameters


def grow(source: Checkpoint, stage: GrowthStage, *, utility: Utility | None = None) -> TransformedCheckpoint:
    """Return the checkpoint after `stage`, computed from `source` on the fly.

    `utility` is what `measure_utility` returns for both; only `duplicate_by_utility` needs it. Raises CheckpointError
    if the model can't grow like this, or if the source is inconsistent.
    """
    if needs_utility(stage) and utility is None:
        raise CheckpointError(f"init={stage.init}: pass utility=measure_utility(source, stage)")
    before = source.record.model
    try:
        grown = grown_model(before, stage)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    stage = replace(stage, init=token_init(before, stage))
    wide = source if stage.hidden_multiple is None else widen(source, stage)
    appended = _append(wide, stage, grown, old_width=before.hidden_size, utility=utility)
    return shrink_and_perturb(appended, stage, stream=_stream(source.record))


def _stream(record: RunRecord) -> str:
    """Return the prefix of the random streams of the next growth."""
    return f"growth.{len(record.lineage)}"


def _append(
    source: Checkpoint, stage: GrowthStage, grown: ModelConfig, *, old_width: int, utility: Utility | None
) -> TransformedCheckpoint:
    """Append layers, parameter tokens and hidden units to a model that already has its new width."""
    record = source.record
    layers = layer_sources(record.model.num_layers, stage)
    rows = LayersAndTokens(
        PartMaker(stage, len(record.lineage) + 1),
        old=model_parameters(record.model),
        layers=layers,
        generations=record.all_generations,
        seed=record.seed,
        stream=_stream(record),
        utility=utility,
    )
    new = model_parameters(grown)
    parts = {name: rows.parts(parameter) for name, parameter in new.items()}
    recipes: dict[str, dict[str, Recipe]] = {}
    for group in source.groups():
        held = {parameter.name for parameter in held_parameters(source, group)}
        recipes[group] = {}
        for name, parameter in new.items():
            template = rows.template(parameter)
            if template.name in held:
                _check_rows(source, group, template)
                recipes[group][name] = _recipe(source, group, template.name, parts=parts[name])
    runs = {name: [run for part in parts[name] for run in part.runs] for name in new}
    tau = grown_taus(record.tau, record.model, grown, stage=stage, layers=layers, utility=utility)
    inserted = [place for place, layer in enumerate(layers) if layer.is_new]
    after = _record(record, grown, stage, inserted=inserted, old_width=old_width)
    after = replace(after, tau=tau).with_generations(Generations.of_runs(runs))
    return TransformedCheckpoint(source, recipes, after)


def _recipe(source: Checkpoint, group: str, template: str, *, parts: list[Part]) -> Recipe:
    _, *columns = source.shape(group, template)
    return Recipe(source.dtype(group, template), tuple(columns), [part.segments[group] for part in parts])


def _check_rows(source: Checkpoint, group: str, old: Parameter) -> None:
    """Raise CheckpointError if a tensor has another number of rows than the metadata says."""
    rows = source.shape(group, old.name)[0]
    if rows != old.shape[0]:
        what = f"{old.kind}_tokens = {old.shape[0]}" if old.has_units else f"{old.shape[0]}"
        raise CheckpointError(f"{old.name} has {rows} rows, the checkpoint's metadata says {what}")


def _record(
    record: RunRecord, grown: ModelConfig, stage: GrowthStage, *, inserted: list[int], old_width: int
) -> RunRecord:
    """Return the record after the growth, with the event in its lineage."""
    model = record.model
    changes = {}
    for kind in model.token_kinds:
        changes[kind] = [getattr(config, f"{kind}_tokens") for config in (model, grown)]
    after = record.after_growth(
        grown,
        kinds={kind: change for kind, change in changes.items() if change[0] != change[1]},
        init=stage.init if model.layer == "tokenformer" else stage.mlp_init,
        inserted_layers=inserted,
        hidden_size=None if grown.hidden_size == old_width else [old_width, grown.hidden_size],
    )
    if stage.optimizer is not None:
        after = after.with_schedule(stage.optimizer)
    if stage.adam_state == "reset":  # the bias correction restarts together with the moments
        after = replace(after, training=replace(after.training, adam_steps=0))
    return after
