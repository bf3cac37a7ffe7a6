"""A module in memory, and the Adam moments of its optimizer, as a checkpoint, which the operators of growth read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generations, Run
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.growth.parts import MODEL
from megatron_tf.modules.adamw import MOMENTS, GrownAdamW, original_runs
from megatron_tf.modules.tokenformer import TokenFormer


class InMemoryCheckpoint:
    """A `Checkpoint` of `tensors`, by group and name; they are read where they are, on any device."""

    directory = Path("the module")
    """Stands for it in messages."""

    def __init__(self, tensors: Mapping[str, Mapping[str, Tensor]], record: RunRecord) -> None:
        self.tensors = tensors
        self.record = record

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return list(self.tensors)

    def names(self, group: str) -> list[str]:
        """Names of the tensors of a group."""
        return list(self.tensors.get(group, {}))

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensor(group, name).shape)

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensor(group, name).dtype

    def read_rows(self, group: str, name: str, *, start: int, stop: int) -> Tensor:
        """Copy rows [start, stop) of a tensor to the CPU. Raises CheckpointError if it has fewer."""
        tensor = self._tensor(group, name)
        if not 0 <= start <= stop <= len(tensor):
            raise CheckpointError(f"{name} has {len(tensor)} rows, [{start}, {stop}) are requested")
        return tensor.detach()[start:stop].to("cpu", copy=True)

    def _tensor(self, group: str, name: str) -> Tensor:
        try:
            return self.tensors[group][name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name!r} in {group!r}") from None


def of_module(model: TokenFormer, optimizer: torch.optim.AdamW | None) -> InMemoryCheckpoint:
    """Return the checkpoint of a module, with Adam moments and generations if it comes with its optimizer."""
    parameters: dict[str, Tensor] = dict(model.transformer.named_parameters())
    record = model.current_record()
    if optimizer is None:
        return InMemoryCheckpoint({MODEL: parameters}, record)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    runs = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if id(parameter) in trained:
            for moment in MOMENTS:
                moments[moment][name] = state.get(moment, torch.zeros_like(parameter))
        runs[name] = _runs(optimizer, parameter, record.all_generations.runs(name, len(parameter)))
    record = record.with_generations(Generations.of_runs(runs))
    return InMemoryCheckpoint({MODEL: parameters, **moments}, record)


def _runs(optimizer: torch.optim.AdamW, parameter: Tensor, recorded: list[Run]) -> list[Run]:
    """Return the runs of a parameter, with the counts of its optimizer.

    An AdamW counts the updates of all rows alike, and scales none of them: of the `recorded` generations only the
    growth that added the rows is true.
    """
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, GrownAdamW) and state:
        return list(optimizer.runs(parameter))
    (whole,) = original_runs(parameter, int(state.get("step", 0)))
    return [Run(run.count, replace(whole.generation, growth=run.generation.growth)) for run in recorded]
