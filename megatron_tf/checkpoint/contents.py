"""What the tensors of a complete model are, and whether a checkpoint holds them."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.parameters import Parameter, initial_taus, model_parameters

_GROUPS = ("model", "exp_avg", "exp_avg_sq")
"""Groups that hold a tensor for each parameter; a later writer may add others."""


def held_parameters(checkpoint: Checkpoint, group: str) -> list[Parameter]:
    """The parameters of which a group holds tensors, in its order; their shapes are those of the model.

    Raises CheckpointError for a tensor that is of no parameter of the model.
    """
    declared = model_parameters(checkpoint.record.model)
    names = checkpoint.names(group)
    if unknown := set(names) - declared.keys():
        raise CheckpointError(f"{checkpoint.directory}: {group} {min(unknown)} is no parameter of its model")
    return [declared[name] for name in names]


def check_complete(checkpoint: Checkpoint) -> ModelConfig:
    """The model of a checkpoint that holds all of it: the tensors, in fp32, and the tau of each Pattention.

    Raises CheckpointError naming the first one that is missing, too many or of another shape.
    """
    where = checkpoint.directory
    model = checkpoint.record.model
    # before names are made for each layer: their number may be absurd
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
    return model


def _check_group(checkpoint: Checkpoint, group: str, expected: dict[str, Parameter]) -> None:
    where = checkpoint.directory
    if difference := names_difference(checkpoint, group, expected):
        raise CheckpointError(f"{where} is not a complete model: its {group!r} {difference}")
    for name, parameter in expected.items():
        found, dtype = checkpoint.shape(group, name), checkpoint.dtype(group, name)
        if found != parameter.shape or dtype != torch.float32:
            raise CheckpointError(
                f"{where} is not the model of its metadata: {group} {name} is {list(found)} {dtype}, expected "
                f"{list(parameter.shape)} {torch.float32}"
            )


def names_difference(checkpoint: Checkpoint, group: str, expected: Collection[str]) -> str | None:
    """Say which tensor a group lacks or also has, and how many more; None where its names are those `expected`."""
    found = set(checkpoint.names(group))
    for differing, verb in ((set(expected) - found, "lacks"), (found - set(expected), "also has")):
        if differing:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            return f"{verb} {min(differing)}{more}"
    return None


def check_tau(source: Path, model: ModelConfig, tau: Mapping[str, float]) -> None:
    """Raise CheckpointError, about the file or directory `source`, unless each Pattention of the model has a tau."""
    if differing := initial_taus(model).keys() ^ tau.keys():
        raise CheckpointError(f"{source}: tau is not there for each projection: {min(differing)}")
