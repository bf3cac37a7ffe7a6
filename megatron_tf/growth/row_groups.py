"""Groups of rows that metrics distinguish after a growth: by growth, kind of parameter and layer."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.checkpoint.generations import Generations
from megatron_tf.config import ParameterKind
from megatron_tf.tokenformer.parameters import Parameter

DEAD = 0.01
"""A token is dead if its contribution is at most this part of the median over the tokens of its module."""


@dataclass(frozen=True, order=True)
class RowGroup:
    """The rows of one layer and kind of parameter that one growth added."""

    growth: int
    """Number of the growth, from 1; 0 for rows of the original model."""
    kind: ParameterKind
    layer: int


class RowGroups:
    """The groups of all rows in the layers of a model; rows outside the layers belong to none."""

    def __init__(self, declared: Mapping[str, Parameter], generations: Generations) -> None:
        self.declared = declared
        self.generations = generations
        tokens: dict[RowGroup, int] = {}
        for parameter in declared.values():
            for rows, group in self._groups(parameter, 0, parameter.shape[0]):
                added = rows.stop - rows.start if parameter.writes_output else 0
                tokens[group] = tokens.get(group, 0) + added
        self.keys = sorted(tokens)
        """All groups; their order is the same on every layout."""
        self.tokens = [tokens[group] for group in self.keys]
        """The number of parameter tokens (or hidden units of an MLP) of each group; 0 for rows that are neither."""
        self.values: dict[str, Parameter] = {}
        """The parameter whose rows are added up for the output, by path of a Pattention or MLP."""
        for parameter in declared.values():
            if parameter.layer is not None and parameter.writes_output:
                self.values[parameter.units_path] = parameter
        self._index = {group: i for i, group in enumerate(self.keys)}

    @property
    def are_new(self) -> bool:
        """Return whether any growth has added rows."""
        return any(group.growth for group in self.keys)

    def slices(self, name: str, start: int, stop: int) -> Iterator[tuple[slice, int]]:
        """Yield the parts of rows [start, stop) of a parameter: rows relative to `start`, and index in `keys`."""
        for rows, group in self._groups(self.declared[name], start, stop):
            yield rows, self._index[group]

    def _groups(self, parameter: Parameter, start: int, stop: int) -> Iterator[tuple[slice, RowGroup]]:
        if parameter.layer is None:
            return
        for rows, index in self.generations.slices(parameter.name, start, stop):
            growth = self.generations.table[index].growth
            yield rows, RowGroup(growth, parameter.kind, parameter.layer)


class ContributionSums:
    """Sums the contributions of the tokens of some modules over the groups; `paths` are those of the modules."""

    def __init__(self, groups: RowGroups, paths: Iterable[str], device: torch.device) -> None:
        self._num_groups = len(groups.keys)
        self._slices: list[tuple[str, slice]] = []
        indices = []
        for path in paths:
            values = groups.values[path]
            for rows, index in groups.slices(values.name, 0, values.shape[0]):
                self._slices.append((path, rows))
                indices.append(index)
        self._indices = torch.tensor(indices, dtype=torch.int64, device=device)

    def __call__(self, squares: Mapping[str, Tensor]) -> Tensor:
        """Compute each group's sum of squared contributions and number of dead tokens: float64 [groups, 2].

        `squares` holds the squared contribution of every token of each module, [N]. Does not wait for the device.
        """
        contributions: dict[str, Tensor] = {}
        is_dead: dict[str, Tensor] = {}
        # few operations for all modules of a size, and two for all slices: each would be a kernel of its own
        for paths in _by_size(squares):
            stacked = torch.stack([squares[path] for path in paths]).double().sqrt()
            ordered = stacked.sort(dim=1).values  # torch.median has no deterministic implementation on a GPU
            median = ordered[:, (stacked.shape[1] - 1) // 2, None]
            contributions |= zip(paths, stacked, strict=True)
            # not <: the median is 0 if most tokens have zero keys
            is_dead |= zip(paths, (stacked <= DEAD * median).double(), strict=True)
        norms = torch._foreach_norm([contributions[path][rows] for path, rows in self._slices])
        counts = torch._foreach_norm([is_dead[path][rows] for path, rows in self._slices], 1)
        sums = torch.stack((torch.stack(list(norms)).square(), torch.stack(list(counts))), dim=1)
        return sums.new_zeros(self._num_groups, 2).index_add_(0, self._indices, sums)


def _by_size(squares: Mapping[str, Tensor]) -> Iterable[list[str]]:
    sizes: dict[int, list[str]] = {}
    for path, values in squares.items():
        sizes.setdefault(len(values), []).append(path)
    return sizes.values()
