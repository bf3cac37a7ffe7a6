"""AdamW over the rows this rank holds, and clipping by a global norm that does not depend on the layout."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from megatron_tf.checkpoint.generations import Generations
from megatron_tf.config import OptimizerConfig
from megatron_tf.parallel.collectives import all_reduce, group_rank, group_size
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.parameters import Module, Parameter
from megatron_tf.training.step.adam import adamw, norms_of_changes, set_adam_state

MOMENTS = ("exp_avg", "exp_avg_sq")

# Each parameter has three views of the same storage, this rank's rows:
#
#   nn.Parameter (a DTensor under FSDP)    the model's; autograd leaves .grad there
#     RowShard.tensor                      the same rows as a plain tensor, with their position in the logical
#       |                                  parameter: used to save, load and sum norms
#       +-- slice in adam.param_groups     what AdamW updates: the rows of one generation
#
# The Adam moments are ours (`_moments`, one tensor for each RowShard): checkpoints read and write them there, and they
# outlive `adam`, which is rebuilt for other generations. `set_adam_state` puts slices of them into adam.state, so that
# a step writes into ours. Only the counts of updates are stored twice: AdamW and `generations` both advance them.


@dataclass(frozen=True)
class Update:
    """The result of an optimizer step, the same on every rank."""

    norm: float
    """Global L2 norm of the gradients, before clipping."""
    norms: Mapping[str, float]
    """The same norm by kind of parameter: embedding, qkv, proj, ffn, norm, final_norm, head."""
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    """The first rank with a non-finite gradient, by parameter. If there is any, nothing was updated."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of a step on this rank, and the squared norms of those of the whole model."""

    tensors: list[Tensor]
    """The gradient of each shard, in the order of the shards."""
    squares: Tensor
    """Squared norm of each parameter of the whole model, float64 [parameters]; the same on every rank."""


class Optimizer:
    """AdamW (arXiv 1711.05101) on the local rows of each parameter.

    It works on plain local tensors, so that all layouts share one code path: the update is elementwise. `shards` are
    the rows behind `parameters`, in the same order; `declared` holds all parameters of the whole model, in the order in
    which their norms are summed. `tied_group` connects the two ranks that hold a copy of the embedding, if any; one
    rank may also hold both. `implementation` is a choice of `megatron_tf.training.step.adam.adamw`.
    """

    def __init__(
        self,
        *,
        parameters: Sequence[nn.Parameter],
        shards: Sequence[RowShard],
        declared: Mapping[str, Parameter],
        config: OptimizerConfig,
        mesh: Mesh,
        tied_group: ProcessGroup | None = None,
        implementation: str = "torch",
    ) -> None:
        self.parameters = parameters
        self.shards = shards
        self.config = config
        self.mesh = mesh
        self.tied_group = tied_group
        self.implementation = implementation
        self.declared = declared
        self.position = {name: i for i, name in enumerate(declared)}  # index in the sum of the global norm
        # copies on other ranks would count twice in the norm, and shards without rows have none
        self._counted = [i for i, shard in enumerate(shards) if shard.is_writer and len(shard.tensor)]
        positions = [self.position[shards[i].name] for i in self._counted]
        self._counted_positions = torch.tensor(positions, dtype=torch.int64, device=mesh.device)
        self._moments: dict[str, list[Tensor]] = {}
        for moment in MOMENTS:
            self._moments[moment] = [torch.zeros_like(shard.tensor) for shard in shards]
        self.generations = Generations.original()

    @property
    def generations(self) -> Generations:
        """The generations of all rows of the model, with the updates so far counted."""
        return self._generations

    @generations.setter
    def generations(self, generations: Generations) -> None:
        self._generations = generations
        self._build_adam()

    @property
    def num_steps(self) -> int:
        """Return the updates that the Adam moments of the oldest rows have accumulated."""
        return max(generation.exp_avg_sq_steps for generation in self._generations.table)

    def _build_adam(self) -> None:
        """Build AdamW over slices of the shards, with one group for each weight decay and generation.

        A shard has a slice for each run of rows of one generation; frozen rows have none.
        """
        table = self._generations.table
        groups: dict[tuple[float, int], list[Tensor]] = {}
        self._trained: list[tuple[int, slice, Tensor]] = []
        self._frozen: list[tuple[int, slice]] = []
        for i, shard in enumerate(self.shards):
            decay = self._weight_decay(self.declared[shard.name])
            for rows, index in self._generations.slices(shard.name, shard.start, shard.stop):
                if table[index].is_frozen:
                    self._frozen.append((i, rows))
                    continue
                part = shard.tensor[rows]
                self._trained.append((i, rows, part))
                groups.setdefault((decay, index), []).append(part)
        param_groups: list[dict[str, Any]] = [
            {"params": parts, "decay": decay, "generation": index}
            for (decay, index), parts in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ]
        if not param_groups:  # no rows here, or all are frozen, and AdamW rejects an empty list
            param_groups = [{"params": [torch.empty(0, device=self.mesh.device)], "decay": 0.0, "generation": 0}]
        self.adam = adamw(
            self.implementation,
            param_groups,
            lr=self.config.lr,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            eps=self.config.adam_eps,
        )
        moments = [
            (part, {moment: self._moments[moment][i][rows] for moment in MOMENTS}) for i, rows, part in self._trained
        ]
        group_of = {part: index for index, group in enumerate(self.adam.param_groups) for part in group["params"]}
        self._in_adam = {(i, rows.start): (group_of[part], part) for i, rows, part in self._trained}
        counts = [table[group["generation"]].exp_avg_sq_steps for group in self.adam.param_groups]
        set_adam_state(self.adam, dict(moments), counts)

    def _set_rates(self, lr: float) -> None:
        """Set the learning rate and weight decay of each group, given that of the schedule."""
        beta1 = self.config.adam_beta1
        for group in self.adam.param_groups:
            generation = self._generations.table[group["generation"]]
            group["lr"], group["weight_decay"] = generation.rates(lr, group["decay"], beta1=beta1)

    def _weight_decay(self, parameter: Parameter) -> float:
        default = self.config.weight_decay if parameter.decays else 0.0
        return self.config.weight_decay_by_kind.get(parameter.kind, default)

    def step(self, lr: float, scale: float = 1.0) -> Update:
        """Take the gradients, multiplied by `scale`, and apply them."""
        return self.apply(self.take_gradients(scale), lr)

    def take_gradients(self, scale: float = 1.0) -> Gradients:
        """Move the gradients, multiplied by `scale`, out of the parameters' .grad and compute their norms. Collective.

        Does not wait for the device.
        """
        tensors = self._take_tensors()
        if scale != 1.0:
            # private, but used by torch's own optimizers: one kernel for many tensors instead of one for each
            torch._foreach_mul_(tensors, scale)
        return Gradients(tensors, self._squares(tensors))

    def apply(self, gradients: Gradients, lr: float) -> Update:
        """Update the parameters.

        If the norm of the gradients is non-finite, nothing changes, and the result names the parameters responsible.
        """
        tensors, squares = gradients.tensors, gradients.squares
        # the optimizer's only wait for the device: it decides whether anything is updated
        norm, *by_parameter = torch.cat((squares.sum().sqrt()[None], squares)).tolist()
        norms = self._by_kind(by_parameter)
        if not math.isfinite(norm):
            return Update(norm, norms, self._find_nonfinite(tensors))
        limit = self.config.clip_grad
        if limit and norm > limit:
            torch._foreach_mul_(tensors, limit / (norm + 1e-6))  # 1e-6 as in torch's clip_grad_norm_
        for i, rows, part in self._trained:
            part.grad = tensors[i] if len(part) == len(tensors[i]) else tensors[i][rows]
        self._set_rates(lr)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)  # slices would keep all gradients in memory until the next backward
        self._generations = self._generations.advanced()
        return Update(norm, norms)

    def update_norms(self, slices: Sequence[tuple[int, slice]]) -> list[Tensor]:
        """Return the norm of what the last step added to each slice: an index in `shards`, and rows of one generation.

        Does not wait for the device.
        """
        norms = [torch.zeros((), device=self.mesh.device)] * len(slices)  # frozen rows do not change
        members: dict[int, list[tuple[int, Tensor]]] = {}
        for place, (i, rows) in enumerate(slices):
            if (i, rows.start) in self._in_adam:
                group_index, part = self._in_adam[i, rows.start]
                members.setdefault(group_index, []).append((place, part))
        for group_index, found in members.items():
            group = self.adam.param_groups[group_index]
            count = self._generations.table[group["generation"]].exp_avg_sq_steps
            changes = norms_of_changes(self.adam, group, [part for _, part in found], count=count)
            for (place, _), norm in zip(found, changes, strict=True):
                norms[place] = norm
        return norms

    def moments(self, moment: str) -> list[RowShard]:
        """Return the rows of `moment` ("exp_avg" or "exp_avg_sq"), sharded like the parameters."""
        return [shard.with_tensor(rows) for shard, rows in zip(self.shards, self._moments[moment], strict=True)]

    def _take_tensors(self) -> list[Tensor]:
        gradients = []
        for parameter, shard in zip(self.parameters, self.shards, strict=True):
            gradient = parameter.grad
            if gradient is None:
                raise AssertionError(f"{shard.name} has no gradient")
            gradients.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
            parameter.grad = None
        self._sum_tied(gradients)
        for i, rows in self._frozen:
            gradients[i][rows].zero_()  # so that clipping does not depend on frozen rows
        return gradients

    def _sum_tied(self, gradients: Sequence[Tensor]) -> None:
        """Sum the gradients of both copies of a tied embedding: that of the lookup, in the first stage, and that of
        the logits, in the last one."""
        copies = [
            gradient
            for shard, gradient in zip(self.shards, gradients, strict=True)
            if self.declared[shard.name].module is Module.EMBEDDING
        ]
        if len(copies) == 2:
            copies[0].add_(copies[1])
            copies[1].copy_(copies[0])
        elif copies and self.tied_group is not None:
            dist.all_reduce(copies[0], group=self.tied_group)

    def _squares(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the squared norm of each parameter of the whole model in canonical order: float64, [parameters].

        The axes are reduced one after the other. The sum over "pp" only adds zeros, so the split into stages does not
        change a single bit of the result.
        """
        squares = torch.zeros(len(self.position), dtype=torch.float64, device=self.mesh.device)
        if self._counted:
            # private, as above: a kernel, or several, for each tensor would leave the GPU idle between them
            norms = torch._foreach_norm([gradients[i] for i in self._counted])
            squares.index_copy_(0, self._counted_positions, torch.stack(norms).double().square())
        for axis in ("tp", "dp_cp", "pp"):
            squares = all_reduce(squares, self.mesh.group(axis))
        return squares

    def _by_kind(self, squares: Sequence[float]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for parameter, square in zip(self.declared.values(), squares, strict=True):
            sums[parameter.kind] = sums.get(parameter.kind, 0.0) + square
        return {kind: math.sqrt(total) for kind, total in sums.items()}

    def _find_nonfinite(self, gradients: Iterable[Tensor]) -> dict[str, int]:
        world = self.mesh.world
        none = group_size(world)  # larger than every rank, so that MIN ignores it
        first = torch.full((len(self.position),), none, device=self.mesh.device)
        for shard, gradient in zip(self.shards, gradients, strict=True):
            if not math.isfinite(float(torch.linalg.vector_norm(gradient))):
                first[self.position[shard.name]] = group_rank(world)
        first = all_reduce(first, world, dist.ReduceOp.MIN)
        return {name: where for name, where in zip(self.position, first.tolist(), strict=True) if where != none}
