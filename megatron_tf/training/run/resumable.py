"""A checkpoint to resume from, opened once, with the stages and phases it has completed and those that are due."""

from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import ConfigError, ModelConfig, RunConfig, to_dict
from megatron_tf.config.moment import count_due

OLDEST_ORDER = "counter"
"""data.order of runs whose checkpoints name none."""


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
    _: KW_ONLY
    saved_phases: int
    """The number of phases of `config.data.phases` that the checkpoint has completed."""
    phases: int
    """The same plus the phases that are due."""

    @property
    def record(self) -> RunRecord:
        """Return the checkpoint's record of its run."""
        return self.reader.record

    def config_at_save(self, config: RunConfig) -> RunConfig:
        """Return the configuration that was in force when the checkpoint was saved, if `config` is the run's."""
        return config.at_stage(self.saved_stage, self.saved_phases)

    def config_from_here(self, config: RunConfig) -> RunConfig:
        """Return the configuration with which the run `config` resumes."""
        return config.at_stage(self.stage, self.phases)


def open_resumable(config: RunConfig, source: Path) -> Resumable:
    """Open the checkpoint at `source`, a run's directory or one of its steps.

    Raises CheckpointError if its model is not the configured one after any growth stage, DamagedCheckpointError if it
    is corrupted.
    """
    reader = CheckpointReader(source).complete()
    record = reader.record
    saved = _saved_stage(record, config, source)
    if starts_over(config, source):
        return Resumable(source=source, reader=reader, saved_stage=saved, stage=saved, saved_phases=0, phases=0)
    step, tokens = record.training.step, record.training.tokens
    phases = count_due(config.data.phases, step=step, tokens=tokens)
    return Resumable(
        source=source,
        reader=reader,
        saved_stage=saved,
        stage=count_due(config.growth, step=step, tokens=tokens, done=saved),
        # fewer are due than are done if the configuration was rewritten, or is that of another run
        saved_phases=min(record.details.phases, phases),
        phases=phases,
    )


def in_order_of(resumable: Resumable | None, config: RunConfig) -> RunConfig:
    """Return the configuration of a run with the order of its samples: a run keeps it if `data.order` is not given.

    Raises ConfigError if `data.phases` needs another order than the one that the run keeps.
    """
    if config.data.order is not None:
        return config
    order = config.data.order_of_new_run
    if resumable is not None and resumable.record.training.samples and not starts_over(config, resumable.source):
        order = resumable.record.data.get("order", OLDEST_ORDER) or order
    if config.data.phases and order != "lanes":
        raise ConfigError(
            f"data.phases needs data.order lanes, but {resumable and resumable.source} was started with {order}: set "
            f"data.order: lanes and checkpoint.allow_changes: [data.order], which may read tokens of the current epoch "
            f"again"
        )
    return replace(config, data=replace(config.data, order=order))


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
