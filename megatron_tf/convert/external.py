"""Checkpoints of other programs: their tensors under our names, with a record as ours have it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import ModelConfig, to_dict
from megatron_tf.tokenformer.dtypes import DTYPES
from megatron_tf.tokenformer.parameters import Parameter

GROUP = "model"
"""The only group in other programs' files, which have no optimizer state."""

Shape = tuple[int, ...]
_EXACT_IN_FP32 = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor in a file of another program, read on demand."""

    shape: Shape
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]
    """Function (start, stop) -> a copy of these rows."""


def in_memory(tensor: Tensor) -> ExternalTensor:
    """Wrap a tensor that has been loaded."""

    def read_rows(start: int, stop: int) -> Tensor:
        return tensor[start:stop].clone(memory_format=torch.contiguous_format)

    return ExternalTensor(tuple(tensor.shape), tensor.dtype, read_rows)


def widened(tensor: ExternalTensor) -> ExternalTensor:
    """Convert a 16-bit tensor to fp32, which represents every fp16 and bf16 value exactly."""

    def read_rows(start: int, stop: int) -> Tensor:
        return tensor.read_rows(start, stop).float()

    return ExternalTensor(tensor.shape, torch.float32, read_rows)


class ExternalCheckpoint:
    """A `Checkpoint` of the tensors in one file or directory, under our names; its only group is "model"."""

    def __init__(self, directory: Path, tensors: Mapping[str, ExternalTensor], record: RunRecord) -> None:
        self.directory = directory
        self.record = record
        self._tensors = tensors

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return [GROUP]

    def names(self, group: str) -> list[str]:
        """Names of the logical tensors of a group; empty for a group it does not have."""
        return list(self._tensors) if group == GROUP else []

    def shape(self, group: str, name: str) -> Shape:
        """Global shape of a tensor."""
        return self._tensor(group, name).shape

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensor(group, name).dtype

    def read_rows(self, group: str, name: str, *, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor. Raises CheckpointError if it has fewer."""
        tensor = self._tensor(group, name)
        if not 0 <= start <= stop <= tensor.shape[0]:
            raise CheckpointError(f"{name} has {tensor.shape[0]} rows, [{start}, {stop}) are requested")
        return tensor.read_rows(start, stop)

    def _tensor(self, group: str, name: str) -> ExternalTensor:
        if group != GROUP or name not in self._tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name!r} in {group!r}")
        return self._tensors[name]


def parameter_bytes(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> int:
    """Return the total size in bytes of all parameters in `dtype`."""
    count = sum(math.prod(checkpoint.shape(GROUP, name)) for name in checkpoint.names(GROUP))
    return count * dtype.itemsize


def check_overflow(what: str, rows: Tensor, rounded: Tensor) -> None:
    """Raise CheckpointError, about the tensor `what`, if a finite value of `rows` is infinite in `rounded`."""
    if rounded.dtype == rows.dtype or not bool(rounded.isinf().any()):
        return
    overflowed = rows[rounded.isinf() & rows.isfinite()]
    if overflowed.numel():
        name = str(rounded.dtype).removeprefix("torch.")
        advice = ": export with --dtype bf16 or fp32" if rounded.dtype == torch.float16 else ""
        raise CheckpointError(f"{what} holds {float(overflowed[0]):g}, which is too large for {name}{advice}")


def rename(
    path: Path, found: Mapping[str, ExternalTensor], *, expected: Mapping[str, Parameter]
) -> dict[str, ExternalTensor]:
    """Rename the tensors of a file to our names, in the order of `expected`, and convert them to fp32.

    `expected` maps the file's names to parameters. Raises CheckpointError naming the first tensor that is missing,
    unexpected, of another shape, or of a type that fp32 can't represent exactly.
    """
    renamed = {}
    for theirs, parameter in expected.items():
        if theirs not in found:
            raise CheckpointError(f"{path} lacks {theirs}")
        tensor = found[theirs]
        if tensor.shape != parameter.shape:
            raise CheckpointError(f"{path}: {theirs} is {list(tensor.shape)}, expected {list(parameter.shape)}")
        if tensor.dtype not in [DTYPES[name] for name in _EXACT_IN_FP32]:
            known = ", ".join(_EXACT_IN_FP32)
            raise CheckpointError(
                f"{path}: {theirs} is {tensor.dtype}, expected {known}: convert the file to fp32 first"
            )
        renamed[parameter.name] = tensor if tensor.dtype == torch.float32 else widened(tensor)
    if strangers := found.keys() - expected.keys():
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise CheckpointError(f"{path} also has {min(strangers)}{more}, which this model does not have")
    return renamed


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer as in the `data` section of a configuration, and its identity."""

    kind: str
    path: Path | None
    identity: dict[str, Any]
    eod_token: str | None = None
    """The end-of-document token, if it is not the one named in the file."""


def unknown_tokenizer(kind: str, vocab_size: int) -> dict[str, Any]:
    """Return the identity of a tokenizer of which only the size is known."""
    return {"type": kind, "vocab_size": vocab_size, "sha256": None, "is_unknown": True}


def external_record(
    model: ModelConfig, tokenizer: TokenizerChoice, *, tau: Mapping[str, float], seq_length: int, seed: int
) -> RunRecord:
    """Make the record of a model that was not trained by this program; a run that loads it starts at step 0."""
    path = None if tokenizer.path is None else str(tokenizer.path)
    end = {} if tokenizer.eod_token is None else {"eod_token": tokenizer.eod_token}
    config = {
        "model": to_dict(model),
        "training": {"seq_length": seq_length, "seed": seed},
        "data": {"tokenizer_type": tokenizer.kind, "tokenizer_model": path, **end},
    }
    return RunRecord(model=model, config=config, tau=tau, tokenizer=tokenizer.identity)
