"""Checks that a checkpoint contains all tensors of its model."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.dtypes import parameter_dtype
from megatron_tf.tokenformer.parameters import Parameter, initial_taus, model_parameters

_GROUPS = ("model", "exp_avg", "exp_avg_sq")
"""Groups with a tensor for each parameter; later versions may add others."""


def stored_dtype(record: RunRecord) -> torch.dtype:
    """Return the dtype of all tensors of a checkpoint: fp64 if the run's training.precision is fp64, otherwise fp32."""
    return parameter_dtype(record.config["training"].get("precision"))


def held_parameters(checkpoint: Checkpoint, group: str) -> list[Parameter]:
    """Return the parameters whose tensors a group contains, in the group's order, with the model's shapes.

    Raises CheckpointError for a tensor that does not belong to a parameter of the model.
    """
    declared = model_parameters(checkpoint.record.model)
    names = checkpoint.names(group)
    if unknown := set(names) - declared.keys():
        raise CheckpointError(f"{checkpoint.directory}: {group} {min(unknown)} is not a parameter of its model")
    return [declared[name] for name in names]


def check_complete(checkpoint: Checkpoint) -> ModelConfig:
    """Return the model of a checkpoint after checking that all its tensors and the tau of each Pattention exist.

    Raises CheckpointError naming the first tensor that is missing, unexpected, or of another shape or type.
    """
    where = checkpoint.directory
    model = checkpoint.record.model
    # before generating names for each layer, whose number may be absurd in a damaged file
    if model.num_layers > len(checkpoint.names("model")):
        raise CheckpointError(
            f"{where} is not a complete model: model.num_layers is {model.num_layers:,}, and it holds "
            f"{len(checkpoint.names('model')):,} tensors"
        )
    expected = model_parameters(model)
    for group in _GROUPS:
        if group == "model" or group in checkpoint.groups():
            _check_group(checkpoint, group, expected)
    check_tau(where, model, checkpoint.record.tau)
    if checkpoint.record.generations is not None:
        sizes = {name: parameter.shape[0] for name, parameter in expected.items()}
        checkpoint.record.generations.check_rows(sizes, where)
    return model


def _check_group(checkpoint: Checkpoint, group: str, expected: dict[str, Parameter]) -> None:
    where = checkpoint.directory
    stored = stored_dtype(checkpoint.record)
    if difference := names_difference(checkpoint, group, expected):
        raise CheckpointError(f"{where} is not a complete model: its {group!r} {difference}")
    for name, parameter in expected.items():
        found, dtype = checkpoint.shape(group, name), checkpoint.dtype(group, name)
        if found != parameter.shape or dtype != stored:
            raise CheckpointError(
                f"{where} is not the model of its metadata: {group} {name} is {list(found)} {dtype}, expected "
                f"{list(parameter.shape)} {stored}"
            )


def names_difference(checkpoint: Checkpoint, group: str, expected: Collection[str]) -> str | None:
    """Describe the first missing or unexpected tensor of a group, and how many more; None if names match."""
    found = set(checkpoint.names(group))
    for differing, verb in ((set(expected) - found, "lacks"), (found - set(expected), "also has")):
        if differing:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            return f"{verb} {min(differing)}{more}"
    return None


def check_tau(source: Path, model: ModelConfig, tau: Mapping[str, float]) -> None:
    """Raise CheckpointError, about the file or directory `source`, unless each Pattention of the model has a tau."""
    if differing := initial_taus(model).keys() ^ tau.keys():
        problem = "unexpected" if min(differing) in tau else "missing"
        raise CheckpointError(f"{source}: tau of {min(differing)} is {problem}")
