"""Between a run and its checkpoints: what is written, what must agree before it is read."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.derived import Checkpoint
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.growth import grow
from megatron_tf.checkpoint.load import CheckpointReader, load_shards
from megatron_tf.checkpoint.metadata import is_same_tokenizer
from megatron_tf.checkpoint.save import Retention, save_checkpoint
from megatron_tf.config import ModelConfig, RunConfig, parse_config, to_dict
from megatron_tf.model.parallelize import parameter_names
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.training.changes import check_changes
from megatron_tf.training.optimizer import MOMENTS
from megatron_tf.training.state import TrainState


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and where its model comes from."""

    tau: dict[str, float]
    """Temperature of every Pattention of the whole model."""
    tokenizer: dict[str, Any]
    """Identity of the tokenizer behind the ids."""
    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Samples read, over all replicas: the position in the data."""
    tokens: int = 0
    """Tokens trained on."""
    adam_steps: int = 0
    """Steps that Adam's bias correction counts."""
    skipped: int = 0
    """Batches that were read and not trained on, since their loss or gradient was not finite."""
    overflows: int = 0
    """Batches that were read and not trained on, since their gradients overflowed at a loss scale too high."""
    lineage: tuple[dict[str, Any], ...] = ()
    """Growth so far, oldest first."""
    after_growth: dict[str, Any] | None = None
    """How training goes on after the last growth, as docs/checkpoint_format.md has it."""
    flops: float = 0.0
    """Operations of the model in all steps, over all stages of growth."""
    device_seconds: float = 0.0
    """Time that devices were held by the run, over all its jobs and ranks."""
    spikes: dict[str, Any] | None = None
    """What the spike detector had seen when the run was saved; None for nothing."""
    data: tuple[dict[str, Any], ...] = ()
    """Identity of each training set."""
    evaluation_due: bool = False
    """Whether a stop left out the evaluation after this step."""

    def after_step(self, samples: int, tokens: int, flops: float) -> "Progress":
        """One optimizer step further."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            adam_steps=self.adam_steps + 1,
            flops=self.flops + flops,
        )

    def after_skip(self, samples: int) -> "Progress":
        """One batch further in the data, and not a step: the schedule stays where it was."""
        return replace(self, samples=self.samples + samples, skipped=self.skipped + 1)

    def after_overflow(self, samples: int) -> "Progress":
        """As `after_skip`, for no fault of the batch."""
        return replace(self, samples=self.samples + samples, overflows=self.overflows + 1)


def new_progress(config: ModelConfig, tokenizer: dict[str, Any], data: Sequence[dict[str, Any]] = ()) -> Progress:
    """A run that begins."""
    with torch.device("meta"):
        tau = {name: module.tau for name, module in TokenFormer(config).pattentions().items()}
    return Progress(tau, tokenizer, data=tuple(data))


def save_state(
    state: TrainState, config: RunConfig, progress: Progress, root: Path, saver: BackgroundSaver | None = None
) -> Path | None:
    """Write the whole run's checkpoint under `root`; every rank calls it and writes what it holds.

    `config` is the one of the present stage of growth. With a `saver` this only begins it; without, it returns the
    checkpoint's directory.
    """
    mesh = state.mesh
    groups = {"model": list(state.shards)} | {moment: state.optimizer.moments(moment) for moment in MOMENTS}
    metadata: dict[str, Any] = {
        "model": to_dict(config.model),
        "config": to_dict(config),
        "tau": progress.tau,
        "tokenizer": progress.tokenizer,
        "lineage": list(progress.lineage),
        "training": {
            "step": progress.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "adam_steps": progress.adam_steps,
            "skipped": progress.skipped,
            "overflows": progress.overflows,
        },
        "usage": {"flops": progress.flops, "device_seconds": progress.device_seconds},
        "run": {
            "data": list(progress.data),
            "spikes": progress.spikes,
            "evaluation_due": progress.evaluation_due,
        },
    }
    if (loss_scale := state.scaler.state()) is not None:
        metadata["loss_scale"] = loss_scale
    if progress.after_growth is not None:
        metadata["after_growth"] = progress.after_growth
    label = f"pp{mesh.rank('pp'):02d}-tp{mesh.rank('tp'):02d}-dp{mesh.rank('dp'):02d}"
    retention = Retention(config.checkpoint.keep_last, config.checkpoint.keep_every)
    if saver is None:
        return save_checkpoint(root, progress.step, groups, metadata, label, mesh.world, retention)
    saver.save(root, progress.step, groups, metadata, label, retention)
    return None


def restore_state(
    state: TrainState,
    config: RunConfig,
    tokenizer: dict[str, Any],
    source: Path,
    data: Sequence[dict[str, Any]] = (),
) -> Progress:
    """Fill the state from the checkpoint `source`, grown if a stage of `growth` is due; under `checkpoint.finetune`
    from the weights of `checkpoint.load` alone.

    `state` is built for the stage that `stage_reached` tells. Raises CheckpointError where the checkpoint is of another
    model or tokenizer, DamagedCheckpointError where it is not what was written.
    """
    checkpoint: Checkpoint = CheckpointReader(source).complete()
    _check_same_tokenizer(checkpoint, tokenizer, source)
    saved, due = _stages(checkpoint, config, source)
    for stage in config.growth[saved:due]:
        checkpoint = grow(checkpoint, stage)
    names = parameter_names(config.at_stage(due).model)
    load_shards(checkpoint, "model", list(state.shards), expected_names=names)
    training, tau = checkpoint.metadata["training"], checkpoint.metadata["tau"]
    for name, module in state.model.pattentions().items():
        module.tau = tau[name]
    lineage = tuple(checkpoint.metadata["lineage"])
    if starts_over(config, source):
        _forget_moments(state)
        return Progress(tau, tokenizer, lineage=lineage, data=tuple(data))
    if training["adam_steps"] or set(MOMENTS) & set(checkpoint.groups()):  # else converted: zeros are its moments
        for moment in MOMENTS:
            load_shards(checkpoint, moment, state.optimizer.moments(moment), expected_names=names)
    state.optimizer.num_steps = training["adam_steps"]
    state.scaler.load(checkpoint.metadata.get("loss_scale"))
    after_growth = checkpoint.metadata.get("after_growth")
    if after_growth is not None:
        state.optimizer.scale_old_rows(after_growth["old_rows"], after_growth["old_tokens_lr_scale"])
    usage, run = checkpoint.metadata.get("usage", {}), checkpoint.metadata.get("run", {})
    has_just_grown = after_growth is not None and after_growth["step"] == training["step"]
    state_of_run = {
        "tau": tau,
        "tokenizer": tokenizer,
        "lineage": lineage,
        "after_growth": after_growth,
        "spikes": None if has_just_grown else run.get("spikes"),  # losses of the model before say nothing of this one
        "data": tuple(data),
        "evaluation_due": run.get("evaluation_due", False),
    }
    counters = {field.name for field in fields(Progress)} - state_of_run.keys()  # a later writer may add others
    return Progress(**state_of_run, **{key: value for key, value in {**training, **usage}.items() if key in counters})


def stage_reached(config: RunConfig, source: Path) -> int:
    """Stages of `config.growth` that a run from the checkpoint `source` is to have behind it: those in the checkpoint,
    and those due since."""
    return _stages(CheckpointReader(source).complete(), config, source)[1]


def changes_since(config: RunConfig, data: Sequence[dict[str, Any]], source: Path) -> str:
    """See `check_changes`; a run that starts over has nothing to compare."""
    if starts_over(config, source):
        return ""
    checkpoint = CheckpointReader(source)
    saved, _ = _stages(checkpoint, config, source)
    return check_changes(config.at_stage(saved), data, checkpoint.metadata, source)


def starts_over(config: RunConfig, source: Path) -> bool:
    """Whether only the weights of `source` are taken: it is the one to fine-tune, and not of this run."""
    return config.checkpoint.finetune and source == config.checkpoint.load


def _forget_moments(state: TrainState) -> None:
    for moment in MOMENTS:
        for shard in state.optimizer.moments(moment):
            shard.tensor.zero_()
    state.optimizer.num_steps = 0


def _stages(checkpoint: Checkpoint, config: RunConfig, source: Path) -> tuple[int, int]:
    """(stages of growth that the checkpoint has behind it, those and the ones due since)."""
    saved = due = _stage_of_model(checkpoint, config, source)
    training = checkpoint.metadata["training"]
    if starts_over(config, source):
        return saved, due
    while due < len(config.growth) and config.growth[due].is_due(training["step"], training["tokens"]):
        due += 1
    return saved, due


def _stage_of_model(checkpoint: Checkpoint, config: RunConfig, source: Path) -> int:
    """After how many stages of growth the configured model is the one of the checkpoint."""
    saved = parse_config(ModelConfig, checkpoint.metadata["model"], str(checkpoint.directory))
    for reached in range(len(config.growth) + 1):
        if config.at_stage(reached).model == saved:
            return reached
    here, asked = to_dict(saved), to_dict(config.model)
    different = "; ".join(
        f"model.{key} is {here[key]} in the checkpoint, {asked[key]} in the configuration"
        for key in sorted(here)
        if here[key] != asked[key]
    )
    raise CheckpointError(
        f"{source} is a checkpoint of another model: {different}. Change the configuration to match, "
        f"grow the checkpoint with megatron-tf reshard-checkpoint, or choose another checkpoint.save"
    )


def _check_same_tokenizer(reader: Checkpoint, tokenizer: dict[str, Any], source: Path) -> None:
    saved = reader.metadata["tokenizer"]
    if not is_same_tokenizer(saved, tokenizer):
        raise CheckpointError(
            f"{source} was trained with another tokenizer ({saved}) than the configured one ({tokenizer})"
        )
