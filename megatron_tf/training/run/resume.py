"""Resume a run from its newest valid checkpoint, at the growth stage that is due."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

from megatron_tf.checkpoint.commit import complete_checkpoints, newest_checkpoint
from megatron_tf.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_tf.checkpoint.format import LATEST
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.run_state import Identity
from megatron_tf.config import ParallelConfig, RunConfig, parse_data_path
from megatron_tf.data.blend import Samples
from megatron_tf.data.build import build_dataset, open_phase
from megatron_tf.growth.advice import advise
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.run.changes import check_changes, warn_of_dropout, warn_of_rounding
from megatron_tf.training.run.checkpointing import blend_of, new_record, restore_state
from megatron_tf.training.run.resumable import Resumable, in_order_of, open_resumable, starts_over
from megatron_tf.training.step.state import TrainState


@dataclass(frozen=True)
class RestoredRun:
    """A run that is ready for its next step."""

    stage: int
    """The number of growth stages completed."""
    state: TrainState
    record: RunRecord
    origin: Path | None
    """The checkpoint it was restored from; None for a new run."""
    damaged: tuple[str, ...] = ()
    """Newer checkpoints that could not be used, and why."""
    changes: str = ""
    """Keys of the configuration that differ from the checkpoint's."""
    warning: str = ""
    """What the run computes otherwise than the run, or the version, that saved the checkpoint; empty for nothing."""
    advice: tuple[str, ...] = ()
    """Lines on the growth by the stages that have just become due, if any."""
    phases: int = 0
    """The number of `data.phases` completed."""
    has_new_data: bool = False
    """Whether a phase of the data has just started: the record's is not the one of the checkpoint."""

    def config_in_force(self, config: RunConfig) -> RunConfig:
        """Return the configuration that is in force from here to the next stage of the run `config`."""
        return config.at_stage(self.stage, self.phases)


@dataclass(frozen=True)
class Resume:
    """Restores the state of a run from its newest valid checkpoint, at the growth stage that is due, or creates it.

    Each rank has its own instance; all methods are collective.
    """

    config: RunConfig
    """The run's configuration before any growth and phase of the data."""
    mesh: Mesh
    _: KW_ONLY
    tokenizer: Identity
    build: Callable[[RunConfig], TrainState]
    """Builds the state for the configuration of a growth stage."""
    data: Mapping[str, Identity] = field(default_factory=dict)
    """Identity of each training set of any phase, by its prefix."""

    def restore(self, opened: Resumable | None = None) -> RestoredRun:
        """Restore the newest checkpoint that is valid on every rank into a new state, or start a new run.

        `opened` is a checkpoint that this rank has already opened; it is reused, and closed like the others. Raises
        CheckpointError if no checkpoint is valid, or if the one to restore has a different model, tokenizer or layout,
        or different data or keys that would change its meaning.
        """
        return self._newest(opened, None)

    def reload_into(self, state: TrainState) -> RestoredRun:
        """Restore into a `state` of the checkpoint's growth stage; without a checkpoint, leave it unchanged."""
        return self._newest(None, state)

    def _newest(self, opened: Resumable | None, state: TrainState | None) -> RestoredRun:
        damaged: list[str] = []
        for source in sources(self.config):
            reason = None
            restored = None
            try:
                resumable = opened if opened and opened.source == source else open_resumable(self.config, source)
                restored = self._read(resumable, state)
            except DamagedCheckpointError as error:
                reason = str(error)
            # damaged for one rank means damaged for all: they have to resume from the same step
            if reason := self.mesh.first_failure(reason):
                damaged.append(reason)
                continue
            assert restored is not None
            return replace(restored, damaged=tuple(damaged))
        if damaged:
            raise CheckpointError(f"no valid checkpoint is left: {'; '.join(damaged)}")
        first = self.config.at_stage(0)
        record = in_phase(new_record(self.config, self.tokenizer, self._identities(first)), first)
        return RestoredRun(stage=0, state=state or self.build(first), record=record, origin=None)

    def _read(self, resumable: Resumable, state: TrainState | None) -> RestoredRun:
        """Restore the run of a checkpoint and close it. Raises like `restore`, and DamagedCheckpointError."""
        config, source = self.config, resumable.source
        changes = ""
        advice: list[str] = []
        staged, at_save = resumable.config_from_here(config), resumable.config_at_save(config)
        warnings = [warn_of_rounding(staged, resumable.record, source)]
        if not has_layout(staged.parallel, self.mesh):
            raise CheckpointError(
                f"the growth stage of {source} has another layout than the ranks that were started: remove the "
                f"damaged checkpoint next to it and restart"
            )
        if not starts_over(config, source):  # the other run's configuration does not matter then
            data = self._identities(at_save)
            changes = check_changes(at_save, data=data, record=resumable.record, source=source)
            warnings.append(warn_of_dropout(staged, resumable.record, source))
        if resumable.stage > resumable.saved_stage:
            advice = advise(resumable.record, staged.model)
        state = state or self.build(staged)
        try:
            restored = restore_state(
                state, config=config, tokenizer=self.tokenizer, resumable=resumable, data=self._identities(staged)
            )
        finally:
            resumable.reader.close()
        record = in_phase(restored, staged)
        return RestoredRun(
            stage=resumable.stage,
            state=state,
            record=record,
            origin=source,
            changes=changes,
            warning="; ".join(filter(None, warnings)),
            advice=tuple(advice),
            phases=resumable.phases,
            has_new_data=restored.details.phase not in (None, record.details.phase),
        )

    def _identities(self, staged: RunConfig) -> tuple[Identity, ...]:
        """Return the identity of each training set of a stage, in the order of its `data.data_path`."""
        prefixes = parse_data_path(staged.data.data_path)[1]
        return tuple(self.data[prefix] for prefix in prefixes if prefix in self.data)


def in_phase(record: RunRecord, staged: RunConfig) -> RunRecord:
    """Return a record with the phase of the data of `staged` that starts or continues at its position."""
    saved = record.details.phase
    phase = open_phase(staged, sample=record.training.samples, saved=saved)
    if phase == saved:
        return record
    # the losses on other data say nothing about spikes
    spikes = record.details.spikes if saved is None else None
    return replace(record, details=replace(record.details, phase=phase, spikes=spikes))


def sources(config: RunConfig) -> list[Path]:
    """Return the checkpoints to resume from: those in `checkpoint.save`, newest first, or else `checkpoint.load`."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None or not ((save / LATEST).exists() or complete_checkpoints(save)):
        if load is not None and not load.exists():
            raise CheckpointError(f"checkpoint.load: {load} does not exist")
        return [] if load is None else [load]
    older = complete_checkpoints(save)[::-1]
    try:
        newest = newest_checkpoint(save)
    except (CheckpointError, OSError):  # `latest` itself is damaged or gone
        return older
    return [*filter(Path.exists, [newest]), *(path for path in older if path != newest)]


def dataset_of_run(config: RunConfig) -> Samples:
    """Build the training data that a run of this configuration reads from its newest checkpoint on, or as a new run."""
    resumable = open_newest(config)
    config = in_order_of(resumable, config)
    if resumable is None or starts_over(config, resumable.source):
        return build_dataset(config.at_stage(0))
    resumable.reader.close()
    staged = resumable.config_from_here(config)
    record = in_phase(resumable.record, staged)
    return build_dataset(staged, blend_of(record), record.details.phase)


def open_newest(config: RunConfig) -> Resumable | None:
    """Open the newest checkpoint that is valid as far as its metadata tells; None if there is none."""
    for source in sources(config):
        try:
            return open_resumable(config, source)
        except DamagedCheckpointError:
            continue
    return None


def has_layout(parallel: ParallelConfig, mesh: Mesh) -> bool:
    """Return whether the mesh has the configured tensor- and pipeline-parallel sizes."""
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return sizes == (mesh.size("tp"), mesh.size("pp"))
