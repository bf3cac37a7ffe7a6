"""Where a run resumes: its newest sound checkpoint, at the stage of growth that is due."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from megatron_tf.checkpoint.commit import complete_checkpoints, newest_checkpoint
from megatron_tf.checkpoint.format import LATEST, CheckpointError, DamagedCheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import Identity, RunRecord
from megatron_tf.config import ParallelConfig, RunConfig
from megatron_tf.data.blend import SPACED
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.run.changes import check_changes
from megatron_tf.training.run.checkpointing import blend_of, new_record, restore_state
from megatron_tf.training.run.resumable import Resumable, open_resumable, starts_over
from megatron_tf.training.step.state import TrainState


@dataclass(frozen=True)
class RestoredRun:
    """A run that can take its next step."""

    stage: int
    """Stages of growth it has behind it."""
    state: TrainState
    record: RunRecord
    origin: Path | None
    """The checkpoint it comes from; None for a new run."""
    damaged: tuple[str, ...] = ()
    """Newer checkpoints that could not be used, and why."""
    changes: str = ""
    """Keys of the configuration that differ from the checkpoint's."""


@dataclass(frozen=True)
class Resume:
    """How a run gets its state: from its newest sound checkpoint, at the stage of growth that is due, or a new one.

    Every rank has one of its own, and all call its methods together.
    """

    config: RunConfig
    """Of the run, before any growth."""
    mesh: Mesh
    _: KW_ONLY
    tokenizer: Identity
    build: Callable[[RunConfig], TrainState]
    """Makes the state of a stage's configuration."""
    data: Sequence[Identity] = ()
    """Identity of each training set."""

    def restore(self, opened: Resumable | None = None) -> RestoredRun:
        """Restore the newest checkpoint that is sound on every rank into a new state, or start a new run.

        `opened` is a checkpoint that this rank has opened before: it is not opened again, and closed like the others.
        Raises CheckpointError where there are checkpoints and none is sound, or where the one to restore is of another
        model, tokenizer or layout, or of other data or keys that change what it means.
        """
        return self._newest(opened, None)

    def reload_into(self, state: TrainState) -> RestoredRun:
        """As `restore`, into a `state` of the checkpoint's stage; without a checkpoint it stays as it is."""
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
            # damaged for one rank, damaged for all: they have to resume from the same step
            if reason := self.mesh.first_failure(reason):
                damaged.append(reason)
                continue
            assert restored is not None
            return replace(restored, damaged=tuple(damaged))
        if damaged:
            raise CheckpointError(f"no sound checkpoint is left: {'; '.join(damaged)}")
        record = new_record(self.config, self.tokenizer, self.data)
        return RestoredRun(0, state or self.build(self.config.at_stage(0)), record, None)

    def _read(self, resumable: Resumable, state: TrainState | None) -> RestoredRun:
        """The run of a checkpoint, which is then closed. Raises as `restore`, and DamagedCheckpointError."""
        config, source = self.config, resumable.source
        changes = ""
        staged = config.at_stage(resumable.stage)
        if not has_layout(staged.parallel, self.mesh):
            raise CheckpointError(
                f"{source} is of a stage with another layout than the ranks that were started: remove the damaged "
                f"checkpoint beside it and start again"
            )
        if not starts_over(config, source):  # else nothing of the other run's configuration counts
            at_save = config.at_stage(resumable.saved_stage)
            changes = check_changes(at_save, data=self.data, record=resumable.record, source=source)
        state = state or self.build(staged)
        try:
            record = restore_state(state, config=config, tokenizer=self.tokenizer, resumable=resumable, data=self.data)
        finally:
            resumable.reader.close()
        return RestoredRun(resumable.stage, state, record, source, changes=changes)


def sources(config: RunConfig) -> list[Path]:
    """Checkpoints to resume from: those in `checkpoint.save` from the newest on, or else `checkpoint.load`."""
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


def blend_of_run(config: RunConfig) -> str:
    """Name the blend in which a run of this configuration reads: its newest checkpoint's, or that of new runs."""
    if len(config.data.data_path) > 1:
        for source in sources(config):
            if starts_over(config, source):
                break
            try:
                return blend_of(CheckpointReader(source).record)
            except DamagedCheckpointError:
                continue
    return SPACED


def open_newest(config: RunConfig) -> Resumable | None:
    """The newest checkpoint to resume from that is sound as far as can be told without its tensors; None for none."""
    for source in sources(config):
        try:
            return open_resumable(config, source)
        except DamagedCheckpointError:
            continue
    return None


def has_layout(parallel: ParallelConfig, mesh: Mesh) -> bool:
    """Whether the mesh is the one that is requested."""
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return sizes == (mesh.size("tp"), mesh.size("pp"))
