"""Between a run and its checkpoints: what is written, what must agree before it is read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader, load_shards
from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.config import ModelConfig, RunConfig, to_dict
from megatron_tf.model.parallelize import parameter_names
from megatron_tf.model.tokenformer import TokenFormer
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
    lineage: tuple[dict[str, Any], ...] = ()
    """Growth so far, oldest first."""

    def after_step(self, samples: int, tokens: int) -> "Progress":
        """One optimizer step further."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            adam_steps=self.adam_steps + 1,
        )


def new_progress(config: ModelConfig, tokenizer: dict[str, Any]) -> Progress:
    """A run that begins."""
    with torch.device("meta"):
        tau = {name: module.tau for name, module in TokenFormer(config).pattentions().items()}
    return Progress(tau, tokenizer)


def save_state(state: TrainState, config: RunConfig, progress: Progress, root: Path) -> Path:
    """Write the whole run's checkpoint under `root`; every rank calls it and writes what it holds."""
    mesh = state.mesh
    groups = {"model": list(state.shards)} | {moment: state.optimizer.moments(moment) for moment in MOMENTS}
    metadata = {
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
        },
    }
    label = f"pp{mesh.rank('pp'):02d}-tp{mesh.rank('tp'):02d}-dp{mesh.rank('dp'):02d}"
    keep_last = config.checkpoint.keep_last
    return save_checkpoint(root, progress.step, groups, metadata, label, mesh.world, keep_last=keep_last)


def restore_state(state: TrainState, config: RunConfig, tokenizer: dict[str, Any]) -> Progress | None:
    """Fill the state from the newest checkpoint in `checkpoint.save`, or from `checkpoint.load` before there is one.

    None where there is none to read. Raises CheckpointError where it is of another model or tokenizer, or damaged.
    """
    source = checkpoint_to_read(config)
    if source is None:
        return None
    reader = CheckpointReader(source)
    _check_same_model(reader, config.model, source)
    _check_same_tokenizer(reader, tokenizer, source)
    names = parameter_names(config.model)
    load_shards(reader, "model", list(state.shards), expected_names=names)
    for moment in MOMENTS:
        load_shards(reader, moment, state.optimizer.moments(moment), expected_names=names)
    training, tau = reader.metadata["training"], reader.metadata["tau"]
    for name, module in state.model.pattentions().items():
        module.tau = tau[name]
    state.optimizer.num_steps = training["adam_steps"]
    return Progress(tau, tokenizer, **training, lineage=tuple(reader.metadata["lineage"]))


def checkpoint_to_read(config: RunConfig) -> Path | None:
    """Where this run goes on from, if anywhere."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is not None and (save / "latest").exists():
        return save
    return load


def _check_same_model(reader: CheckpointReader, model: ModelConfig, source: Path) -> None:
    saved, asked = reader.metadata["model"], to_dict(model)
    different = [
        f"model.{key} is {saved.get(key)} in the checkpoint, {asked.get(key)} in the configuration"
        for key in sorted(saved.keys() | asked.keys())
        if saved.get(key) != asked.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{source} is a checkpoint of another model: {'; '.join(different)}. Change the configuration to match, "
            f"grow the checkpoint with tools/reshard_checkpoint.py, or choose another checkpoint.save"
        )


def _check_same_tokenizer(reader: CheckpointReader, tokenizer: dict[str, Any], source: Path) -> None:
    saved = reader.metadata["tokenizer"]
    if saved != tokenizer:
        raise CheckpointError(
            f"{source} was trained with another tokenizer ({saved}) than the configured one ({tokenizer})"
        )
