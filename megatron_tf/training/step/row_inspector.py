"""Measures old and new rows during a step: gradients, updates, and contributions to the outputs of their modules."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_tf.growth.row_groups import ContributionSums, RowGroups
from megatron_tf.layers.row_probe import RowProbe
from megatron_tf.parallel.collectives import all_gather_copy, all_reduce
from megatron_tf.training.observability.row_metrics import RowMetrics
from megatron_tf.training.step.optimizer import Optimizer


class RowInspector:
    """Measures the groups of rows of a model that has grown.

    It applies to one stage of growth: `optimizer` has to have the generations of that stage. The values are those of
    the whole model on every layout, and the same on every rank.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.mesh = optimizer.mesh
        self.groups = RowGroups(optimizer.declared, optimizer.generations)
        self._slices: list[tuple[int, slice]] = []  # index of the shard, and its rows
        indices = []
        for i, shard in enumerate(optimizer.shards):
            if not shard.is_writer:  # another rank counts these rows
                continue
            for rows, index in self.groups.slices(shard.name, shard.start, shard.stop):
                self._slices.append((i, rows))
                indices.append(index)
        self._indices = torch.tensor(indices, dtype=torch.int64, device=self.mesh.device)
        held = {shard.name for shard in optimizer.shards}
        paths = [path for path, values in self.groups.values.items() if values.name in held]
        self._sums = ContributionSums(self.groups, paths, self.mesh.device)

    def gradient_squares(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return this rank's part of the squared norm of each group, float64 [groups].

        `gradients` are those of the optimizer's shards, before clipping. Does not wait for the device.
        """
        parts = [gradients[i][rows] for i, rows in self._slices]
        # private, as in the optimizer: one kernel, or a few, for many tensors
        return self._by_group(torch._foreach_norm(parts) if parts else ())

    def measure(self, probes: Mapping[str, RowProbe], gradients: Tensor) -> list[RowMetrics]:
        """Measure the step that the optimizer has just taken; `gradients` are its `gradient_squares`. Collective.

        Waits for the device once.
        """
        totals = torch.zeros(len(self.groups.keys), 4, dtype=torch.float64, device=self.mesh.device)
        totals[:, 0] = gradients
        totals[:, 1] = self._by_group(self.optimizer.update_norms(self._slices))
        self._add_contributions(totals[:, 2:], probes)
        for axis in ("tp", "dp_cp", "pp"):
            totals = all_reduce(totals, self.mesh.group(axis))
        rows = zip(self.groups.keys, self.groups.tokens, totals.tolist(), strict=True)
        return [
            RowMetrics(
                growth=group.growth,
                kind=group.kind,
                layer=group.layer,
                grad_norm=math.sqrt(gradient),
                update_norm=math.sqrt(update),
                tokens=tokens,
                contribution=math.sqrt(contribution),
                dead=int(dead),
            )
            for group, tokens, (gradient, update, contribution, dead) in rows
        ]

    def _by_group(self, norms: Sequence[Tensor]) -> Tensor:
        """Sum the squares of the norms of all slices over the slices of each group: float64 [groups]."""
        squares = torch.zeros(len(self.groups.keys), dtype=torch.float64, device=self.mesh.device)
        return squares.index_add_(0, self._indices, torch.stack(list(norms)).double().square()) if norms else squares

    def _add_contributions(self, totals: Tensor, probes: Mapping[str, RowProbe]) -> None:
        """Add those of this stage's modules to `totals` [groups, 2], on one rank of the stage."""
        parts = []
        num_rows = 0
        for probe in probes.values():
            assert probe.norms is not None
            parts.append(probe.norms)
            num_rows = probe.num_rows  # the same for all modules
        # the modules' tokens one after the other: each rank has its own tokens, and each of "dp_cp" its own input
        squares = all_reduce(torch.cat(parts).double().square(), self.mesh.group("dp_cp"))
        squares /= num_rows * self.mesh.size("dp_cp")
        whole = all_gather_copy(squares[None], 0, self.mesh.group("tp"))
        if self.mesh.rank("tp") or self.mesh.rank("dp_cp"):
            return
        modules = whole.split([len(part) for part in parts], dim=1)
        totals += self._sums({path: part.flatten() for path, part in zip(probes, modules, strict=True)})
