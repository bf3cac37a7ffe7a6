"""Between a run and its checkpoints: what is written, what must agree before it is read."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.growth import grow
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.load import load_shards
from megatron_tf.checkpoint.record import Identity, RunDetails, RunRecord, is_same_tokenizer
from megatron_tf.checkpoint.save import Retention, save_checkpoint
from megatron_tf.config import RunConfig, to_dict
from megatron_tf.data.blend import GREEDY, SPACED
from megatron_tf.tokenformer.parameters import initial_taus, model_parameters
from megatron_tf.training.run.resumable import Resumable, starts_over
from megatron_tf.training.step.optimizer import MOMENTS
from megatron_tf.training.step.state import TrainState


def new_record(config: RunConfig, tokenizer: Identity, data: Sequence[Identity] = ()) -> RunRecord:
    """The record of a new run at its first stage, before its first step."""
    return RunRecord(
        model=config.model,
        config=to_dict(config.at_stage(0)),
        tau=initial_taus(config.model),
        tokenizer=tokenizer,
        details=RunDetails(data=tuple(data), blend=SPACED),
        growth_stage=0,
    )


def save_state(
    state: TrainState, config: RunConfig, record: RunRecord, *, root: Path, saver: BackgroundSaver | None = None
) -> Path | None:
    """Write the whole run's checkpoint under `root`; every rank calls it and writes what it holds.

    `config` is the one of the present stage of growth. With a `saver` this only starts it; without, it returns the
    checkpoint's directory.
    """
    mesh = state.mesh
    for name, module in state.model.pattentions().items():  # tau travels with the model, the record keeps a copy
        assert module.tau == record.tau[name], (
            f"{name} computes with tau {module.tau}, the record says {record.tau[name]}"
        )
    groups = {"model": list(state.shards)} | {moment: state.optimizer.moments(moment) for moment in MOMENTS}
    record = replace(record, model=config.model, config=to_dict(config), loss_scale=state.scaler.state())
    step = record.training.step
    label = f"pp{mesh.rank('pp'):02d}-tp{mesh.rank('tp'):02d}-dp{mesh.rank('dp'):02d}"
    retention = Retention(config.checkpoint.keep_last, config.checkpoint.keep_every)
    save = partial(save_checkpoint, root, step, record=record, writer_label=label, retention=retention)
    if saver is None:
        return save(tensors=groups, process_group=mesh.world)
    saver.save(save, groups)
    return None


def restore_state(
    state: TrainState,
    *,
    config: RunConfig,
    tokenizer: Identity,
    resumable: Resumable,
    data: Sequence[Identity] = (),
) -> RunRecord:
    """Fill the state from a checkpoint, grown if a stage of `growth` is due, and return the record to continue with;
    under `checkpoint.finetune` from the weights of `checkpoint.load` alone.

    `state` is built for `resumable.stage`, `config` is the run's before any growth. Raises CheckpointError where the
    checkpoint is of another tokenizer, DamagedCheckpointError where it is not what was written.
    """
    source, checkpoint = resumable.source, _grown(resumable, config)
    record = checkpoint.record
    _check_same_tokenizer(record, tokenizer, source)
    staged = config.at_stage(resumable.stage)
    names = model_parameters(staged.model).keys()
    load_shards(checkpoint, "model", list(state.shards), expected_names=names)
    for name, module in state.model.pattentions().items():
        module.tau = record.tau[name]
    restored = RunRecord(
        model=staged.model,
        config=to_dict(staged),
        tau=record.tau,
        tokenizer=tokenizer,
        lineage=record.lineage,
        details=RunDetails(data=tuple(data), blend=SPACED),
        growth_stage=resumable.stage,
    )
    if starts_over(config, source):
        _forget_moments(state)
        return restored
    # a converted checkpoint has no optimizer state: zeros are its moments
    if record.training.adam_steps or set(MOMENTS) & set(checkpoint.groups()):
        for moment in MOMENTS:
            load_shards(checkpoint, moment, state.optimizer.moments(moment), expected_names=names)
    state.optimizer.num_steps = record.training.adam_steps
    state.scaler.load(record.loss_scale)
    after = record.after_growth
    if after is not None:
        state.optimizer.scale_old_rows(after.old_rows, after.old_tokens_lr_scale)
    has_just_grown = after is not None and after.step == record.training.step
    details = RunDetails(
        data=tuple(data),
        spikes=None if has_just_grown else record.details.spikes,  # losses of the model before say nothing of this one
        evaluation_due=record.details.evaluation_due,
        blend=blend_of(record),
    )
    return replace(restored, training=record.training, usage=record.usage, details=details, after_growth=after)


def _grown(resumable: Resumable, config: RunConfig) -> Checkpoint:
    """The checkpoint after the stages that are due."""
    checkpoint: Checkpoint = resumable.reader
    for stage in config.growth[resumable.saved_stage : resumable.stage]:
        checkpoint = grow(checkpoint, stage)
    return checkpoint


def blend_of(record: RunRecord) -> str:
    """The blend that a run from this checkpoint keeps: version 0.1, which names none, had the greedy one.

    A checkpoint without a position in the data, such as a converted one, starts a new run.
    """
    if not record.training.samples:
        return SPACED
    return record.details.blend or GREEDY


def _forget_moments(state: TrainState) -> None:
    for moment in MOMENTS:
        for shard in state.optimizer.moments(moment):
            shard.tensor.zero_()
    state.optimizer.num_steps = 0


def _check_same_tokenizer(record: RunRecord, tokenizer: Identity, source: Path) -> None:
    if not is_same_tokenizer(record.tokenizer, tokenizer):
        raise CheckpointError(
            f"{source} was trained with another tokenizer ({record.tokenizer}) than the configured one ({tokenizer})"
        )
