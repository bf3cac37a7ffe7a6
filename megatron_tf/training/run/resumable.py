"""A checkpoint to resume from, opened once, with the growth stages it has completed and those that are due."""

from dataclasses import dataclass
from pathlib import Path

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import ModelConfig, RunConfig, to_dict


@dataclass(frozen=True)
class Resumable:
    """A complete checkpoint whose model is that of one of the configuration's growth stages."""

    source: Path
    """Its path, as in the configuration or in the run's directory."""
    reader: CheckpointReader
    saved_stage: int
    """The number of stages of `config.growth` that the checkpoint has completed."""
    stage: int
    """The same plus the stages that are due: the stage at which a run resumes from it."""

    @property
    def record(self) -> RunRecord:
        """Return the checkpoint's record of its run."""
        return self.reader.record


def open_resumable(config: RunConfig, source: Path) -> Resumable:
    """Open the checkpoint at `source`, a run's directory or one of its steps.

    Raises CheckpointError if its model is not the configured one after any growth stage, DamagedCheckpointError if it
    is corrupted.
    """
    reader = CheckpointReader(source).complete()
    saved = due = _saved_stage(reader.record, config, source)
    training = reader.record.training
    if not starts_over(config, source):
        while due < len(config.growth) and config.growth[due].is_due(training.step, training.tokens):
            due += 1
    return Resumable(source, reader, saved, due)


def starts_over(config: RunConfig, source: Path) -> bool:
    """Return whether only the weights of `source` are loaded, because it is the checkpoint to fine-tune."""
    return config.checkpoint.finetune and source == config.checkpoint.load


def _saved_stage(record: RunRecord, config: RunConfig, source: Path) -> int:
    """Return the stage that the record names if the configuration has the same model there.

    Otherwise find the stage by its model: older checkpoints name no stage, and those of another run, or of one whose
    `growth` was rewritten, number stages differently.
    """
    models = [config.at_stage(stage).model for stage in range(len(config.growth) + 1)]
    stages = range(len(models))
    recorded = record.growth_stage if record.growth_stage in stages else None
    if recorded is not None and models[recorded] == record.model:
        return recorded
    if record.model in models:
        return models.index(record.model)
    if recorded is None:
        recorded = min(stages, key=lambda stage: len(_differing_keys(record.model, models[stage])))
    raise _another_model(record.model, models[recorded], stage=recorded, source=source)


def _another_model(saved: ModelConfig, configured: ModelConfig, *, stage: int, source: Path) -> CheckpointError:
    here, there = to_dict(saved), to_dict(configured)
    after = f" after growth[{stage - 1}]" if stage else ""
    different = "; ".join(
        f"model.{key} is {here[key]} in the checkpoint, {there[key]} in the configuration{after}"
        for key in _differing_keys(saved, configured)
    )
    return CheckpointError(
        f"{source} is a checkpoint of another model: {different}. Change the configuration to match, "
        f"grow the checkpoint with megatron-tf reshard-checkpoint, or choose another checkpoint.save"
    )


def _differing_keys(saved: ModelConfig, configured: ModelConfig) -> list[str]:
    here, there = to_dict(saved), to_dict(configured)
    return sorted(key for key in here if here[key] != there[key])
