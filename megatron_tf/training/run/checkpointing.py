"""Save the state of a run to a checkpoint, and restore it after checking that the two match."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generations
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.load import load_shards
from megatron_tf.checkpoint.record import RunRecord, is_same_tokenizer
from megatron_tf.checkpoint.run_state import Identity, RunDetails
from megatron_tf.checkpoint.save import Retention, save_checkpoint
from megatron_tf.config import RunConfig, to_dict
from megatron_tf.data.blend import GREEDY, SPACED
from megatron_tf.growth.grow import grow
from megatron_tf.growth.utility import needs_utility
from megatron_tf.kernels.dropout import GENERATOR
from megatron_tf.model.parallelize import pattentions
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.parameters import initial_taus, model_parameters
from megatron_tf.training.run.resumable import Resumable, starts_over
from megatron_tf.training.run.schedule_start import restored_start
from megatron_tf.training.run.utility import utility_on_all_ranks
from megatron_tf.training.step.optimizer import MOMENTS
from megatron_tf.training.step.state import TrainState


def new_record(config: RunConfig, tokenizer: Identity, data: Sequence[Identity] = ()) -> RunRecord:
    """Create the record of a new run at its first growth stage, before its first step."""
    return RunRecord(
        model=config.model,
        config=to_dict(config.at_stage(0)),
        tau=initial_taus(config.model),
        tokenizer=tokenizer,
        details=RunDetails(data=tuple(data), blend=SPACED, dropout=GENERATOR),
        growth_stage=0,
    )


def save_state(
    state: TrainState, config: RunConfig, record: RunRecord, *, root: Path, saver: BackgroundSaver | None = None
) -> Path | None:
    """Write a checkpoint of the whole run under `root`; every rank writes the rows it holds. Collective.

    `config` is that of the current growth stage. With a `saver`, the save runs in the background; without one, returns
    the checkpoint's directory.
    """
    mesh = state.mesh
    for name, module in pattentions(state.stages).items():  # tau is part of the model; the record has a copy
        assert module.tau == record.tau[name], (
            f"{name} computes with tau {module.tau}, the record says {record.tau[name]}"
        )
    groups = {"model": list(state.shards)} | {moment: state.optimizer.moments(moment) for moment in MOMENTS}
    record = saved_record(state, config, record)
    step = record.training.step
    label = writer_label(pipeline=mesh.rank("pp"), tensor=mesh.rank("tp"), data=mesh.rank("dp_cp"))
    retention = Retention(config.checkpoint.keep_last, config.checkpoint.keep_every)
    save = partial(save_checkpoint, root, step, record=record, writer_label=label, retention=retention)
    if saver is None:
        return save(tensors=groups, process_group=mesh.world)
    saver.save(save, groups)
    return None


def saved_record(state: TrainState, config: RunConfig, record: RunRecord) -> RunRecord:
    """Return `record` with what the state adds to it, as a checkpoint stores it."""
    record = replace(record, model=config.model, config=to_dict(config), loss_scale=state.scaler.state())
    return record.with_generations(state.optimizer.generations)


def writer_label(*, pipeline: int, tensor: int, data: int) -> str:
    """Return what names the files of the rank at these coordinates."""
    return f"pp{pipeline:02d}-tp{tensor:02d}-dp{data:02d}"


def restore_state(
    state: TrainState,
    *,
    config: RunConfig,
    tokenizer: Identity,
    resumable: Resumable,
    data: Sequence[Identity] = (),
) -> RunRecord:
    """Load a checkpoint into the state, grown if a stage of `growth` is due, and return the record to continue with.

    With `checkpoint.finetune`, only the weights of `checkpoint.load` are loaded. `config` is the run's before any
    growth, `state` is built for `resumable.config_from_here(config)`. Raises CheckpointError if the checkpoint belongs
    to another tokenizer or does not fit the schedules of `growth`, DamagedCheckpointError if it is corrupted.
    """
    source, checkpoint = resumable.source, _grown(resumable, config, state.mesh)
    record = checkpoint.record
    _check_same_tokenizer(record, tokenizer, source)
    staged = resumable.config_from_here(config)
    start_of_schedule = partial(restored_start, config, stage=resumable.stage, phases=resumable.phases, source=source)
    names = model_parameters(staged.model).keys()
    load_shards(checkpoint, "model", list(state.shards), expected_names=names)
    for name, module in pattentions(state.stages).items():
        module.tau = record.tau[name]
    restored = RunRecord(
        model=staged.model,
        config=to_dict(staged),
        tau=record.tau,
        tokenizer=tokenizer,
        lineage=record.lineage,
        details=RunDetails(data=tuple(data), blend=SPACED, dropout=GENERATOR),
        growth_stage=resumable.stage,
    )
    if starts_over(config, source):
        _forget_moments(state)
        return replace(restored, schedule_start=start_of_schedule(restored))
    # a converted checkpoint has no optimizer state: its Adam moments are zero
    if record.training.adam_steps or set(MOMENTS) & set(checkpoint.groups()):
        for moment in MOMENTS:
            load_shards(checkpoint, moment, state.optimizer.moments(moment), expected_names=names)
    state.optimizer.generations = record.all_generations
    state.scaler.load(record.loss_scale)
    has_just_grown = bool(record.lineage) and record.lineage[-1].step == record.training.step
    details = RunDetails(
        data=tuple(data),
        spikes=None if has_just_grown else record.details.spikes,  # they do not apply to the grown model
        evaluation_due=record.details.evaluation_due,
        blend=blend_of(record),
        dropout=GENERATOR,
        phase=record.details.phase,
        phases=resumable.phases,
    )
    return replace(
        restored,
        training=record.training,
        usage=record.usage,
        details=details,
        generations=record.generations,
        schedule_start=start_of_schedule(record),
    )


def _grown(resumable: Resumable, config: RunConfig, mesh: Mesh) -> Checkpoint:
    """Apply the growth stages that are due to the checkpoint. Collective."""
    checkpoint: Checkpoint = resumable.reader
    for stage in config.growth[resumable.saved_stage : resumable.stage]:
        utility = utility_on_all_ranks(checkpoint, stage, mesh) if needs_utility(stage) else None
        checkpoint = grow(checkpoint, stage, utility=utility)
    return checkpoint


def blend_of(record: RunRecord) -> str:
    """Return the blend that a run resumed from this checkpoint keeps.

    Version 0.1, which did not record it, used the greedy blend. A checkpoint without a position in the data, such as a
    converted one, starts a new run.
    """
    if not record.training.samples:
        return SPACED
    return record.details.blend or GREEDY


def _forget_moments(state: TrainState) -> None:
    for moment in MOMENTS:
        for shard in state.optimizer.moments(moment):
            shard.tensor.zero_()
    state.optimizer.generations = Generations.original()


def _check_same_tokenizer(record: RunRecord, tokenizer: Identity, source: Path) -> None:
    if not is_same_tokenizer(record.tokenizer, tokenizer):
        raise CheckpointError(
            f"{source} was trained with another tokenizer ({record.tokenizer}) than the configured one ({tokenizer})"
        )
