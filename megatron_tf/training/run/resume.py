"""Resume a run from its newest valid checkpoint, at the growth stage that is due."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from megatron_tf.checkpoint.commit import complete_checkpoints, newest_checkpoint
from megatron_tf.checkpoint.format import LATEST, CheckpointError, DamagedCheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import Identity, RunRecord
from megatron_tf.config import ParallelConfig, RunConfig
from megatron_tf.data.blend import Samples
from megatron_tf.data.build import build_dataset, open_phase
from megatron_tf.growth.advice import advise
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.run.changes import check_changes, warn_of_dropout, warn_of_rounding
from megatron_tf.training.run.checkpointing import blend_of, new_record, restore_state
from megatron_tf.training.run.resumable import Resumable, open_resumable, starts_over
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


@dataclass(frozen=True)
class Resume:
    """Restores the state of a run from its newest valid checkpoint, at the growth stage that is due, or creates it.

    Each rank has its own instance; all methods are collective.
    """

    config: RunConfig
    """The run's configuration before any growth."""
    mesh: Mesh
    _: KW_ONLY
    tokenizer: Identity
    build: Callable[[RunConfig], TrainState]
    """Builds the state for the configuration of a growth stage."""
    data: Sequence[Identity] = ()
    """Identity of each training set."""

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
        record = self._in_phase(new_record(self.config, self.tokenizer, self.data))
        return RestoredRun(0, state or self.build(self.config.at_stage(0)), record, None)

    def _read(self, resumable: Resumable, state: TrainState | None) -> RestoredRun:
        """Restore the run of a checkpoint and close it. Raises like `restore`, and DamagedCheckpointError."""
        config, source = self.config, resumable.source
        changes = ""
        advice: list[str] = []
        staged = config.at_stage(resumable.stage)
        warnings = [warn_of_rounding(staged, resumable.record, source)]
        if not has_layout(staged.parallel, self.mesh):
            raise CheckpointError(
                f"the growth stage of {source} has another layout than the ranks that were started: remove the "
                f"damaged checkpoint next to it and restart"
            )
        if not starts_over(config, source):  # the other run's configuration does not matter then
            at_save = config.at_stage(resumable.saved_stage)
            changes = check_changes(at_save, data=self.data, record=resumable.record, source=source)
            warnings.append(warn_of_dropout(staged, resumable.record, source))
        if resumable.stage > resumable.saved_stage:
            advice = advise(resumable.record, staged.model)
        state = state or self.build(staged)
        try:
            record = restore_state(state, config=config, tokenizer=self.tokenizer, resumable=resumable, data=self.data)
        finally:
            resumable.reader.close()
        record = self._in_phase(record)
        warning = "; ".join(filter(None, warnings))
        return RestoredRun(
            resumable.stage, state, record, source, changes=changes, warning=warning, advice=tuple(advice)
        )

    def _in_phase(self, record: RunRecord) -> RunRecord:
        """Return the record with the phase of the data that starts or continues at its position."""
        phase = open_phase(self.config, sample=record.training.samples, saved=record.details.phase)
        return replace(record, details=replace(record.details, phase=phase))


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
    for source in sources(config):
        if starts_over(config, source):
            break
        try:
            record = CheckpointReader(source).record
        except DamagedCheckpointError:
            continue
        phase = open_phase(config, sample=record.training.samples, saved=record.details.phase)
        return build_dataset(config, blend_of(record), phase)
    return build_dataset(config)


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
