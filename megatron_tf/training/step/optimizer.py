"""AdamW over the rows this rank holds, with clipping by a global norm that no layout changes the order of."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from megatron_tf.config import OptimizerConfig
from megatron_tf.parallel.collectives import all_reduce, group_rank, group_size
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.parameters import Module, Parameter
from megatron_tf.training.step.adam import adamw, set_adam_state

MOMENTS = ("exp_avg", "exp_avg_sq")

# A parameter has three bodies, all over the same storage of this rank's rows:
#
#   nn.Parameter (a DTensor under FSDP)    the model's; autograd leaves .grad there
#     RowShard.tensor                      the same rows as a plain tensor, with their place in the logical parameter:
#       |                                  what is saved, loaded and summed in norms
#       +-- slice in adam.param_groups     what AdamW steps: all rows, or the old and the new ones apart
#
# The Adam moments are ours (`_moments`, one tensor for each RowShard): checkpoints read and write them there, and they
# outlive `adam`, which is built again when old rows get another learning rate. adam.state holds slices of them, put
# there by `set_adam_state`, so that a step writes into ours. Only the number of steps is kept twice: `num_steps` sets
# both.


@dataclass(frozen=True)
class Update:
    """What a step did; the same on every rank."""

    norm: float
    """Global L2 norm of the gradients, before clipping."""
    norms: Mapping[str, float]
    """The same by kind: embedding, qkv, proj, ffn, final_norm, head."""
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    """Parameters whose gradient was non-finite, and the first rank that holds such rows. Nothing was updated then."""


class Optimizer:
    """AdamW (arXiv 1711.05101) on the local rows of each parameter.

    Working on plain local tensors keeps every layout on one path: what is sharded over ranks is elementwise here.
    `shards` name the rows behind `parameters`, in the same order; `declared` are all parameters of the whole model, in
    the order in which their norms are summed. `tied_group` joins the stages that hold a copy of the embedding, if they
    are two. `implementation` is a name that `megatron_tf.training.step.adam.adamw` knows.
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
        self.position = {name: i for i, name in enumerate(declared)}  # in the sum of the global norm
        self._moments: dict[str, list[Tensor]] = {}
        for moment in MOMENTS:
            self._moments[moment] = [torch.zeros_like(shard.tensor) for shard in shards]
        self._num_steps = 0
        self._old = [0] * len(shards)  # how many of the first rows of each shard are old
        self._lr_scale = 1.0
        self._build_adam()

    def scale_old_rows(self, old_rows: Mapping[str, int], lr_scale: float) -> None:
        """Train the first `old_rows[name]` rows of the tensors named at `lr_scale` times the learning rate.

        At 0 they are frozen: no bit of them or of their moments changes, and their gradients do not count in the norm.
        """
        self._lr_scale = lr_scale
        self._old = [0] * len(self.shards)
        if lr_scale != 1.0:
            for i, shard in enumerate(self.shards):
                self._old[i] = min(max(old_rows.get(shard.name, 0) - shard.start, 0), len(shard.tensor))
        self._build_adam()

    def _build_adam(self) -> None:
        """Make the third body of each parameter: slices of its shard, in groups of one weight decay and learning rate.

        A shard is one slice, or two where a growth gave its old rows a learning rate of their own; of frozen rows there
        is no slice. A shard without rows is an empty slice.
        """
        groups: dict[tuple[float, float], list[Tensor]] = {}
        self._trained: list[tuple[int, slice, Tensor]] = []
        for i, (shard, old) in enumerate(zip(self.shards, self._old, strict=True)):
            decay = self._weight_decay(self.declared[shard.name])
            for rows, scale in ((slice(0, old), self._lr_scale), (slice(old, len(shard.tensor)), 1.0)):
                if scale == 0 or (rows.start == rows.stop and len(shard.tensor)):
                    continue  # frozen, or no such rows
                part = shard.tensor[rows]
                self._trained.append((i, rows, part))
                groups.setdefault((decay, scale), []).append(part)
        param_groups: list[dict[str, Any]] = [
            {"params": parts, "weight_decay": decay, "lr_scale": scale}
            for (decay, scale), parts in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ]
        if not param_groups:  # all rows here are frozen, and AdamW takes no empty list
            param_groups = [{"params": [torch.empty(0, device=self.mesh.device)], "lr_scale": 1.0}]
        self.adam = adamw(
            self.implementation,
            param_groups,
            lr=self.config.lr,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            eps=self.config.adam_eps,
        )
        self._fill_state()

    def _weight_decay(self, parameter: Parameter) -> float:
        default = self.config.weight_decay if parameter.decays else 0.0
        return self.config.weight_decay_by_kind.get(parameter.kind, default)

    def _fill_state(self) -> None:
        moments: list[tuple[Tensor, dict[str, Tensor]]] = []
        for i, rows, part in self._trained:
            moments.append((part, {moment: self._moments[moment][i][rows] for moment in MOMENTS}))
        set_adam_state(self.adam, moments, self._num_steps)

    def step(self, lr: float, scale: float = 1.0) -> Update:
        """Apply the gradients in the parameters' .grad times `scale` and clear them.

        Where their norm is non-finite nothing else changes, and the result names the parameters to blame.
        """
        gradients = self._take_gradients()
        if scale != 1.0:
            # private, but what torch's optimizers call: one kernel for many tensors, where mul_ launches one for each
            torch._foreach_mul_(gradients, scale)
        squares = self._squares(gradients)
        # the one wait for the device in a step of the optimizer: whether anything is updated depends on it
        norm = float(squares.sum().sqrt())
        norms = self._by_kind(squares.tolist())
        if not math.isfinite(norm):
            return Update(norm, norms, self._find_nonfinite(gradients))
        limit = self.config.clip_grad
        if limit and norm > limit:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))  # 1e-6 as in torch's clip_grad_norm_
        for i, rows, part in self._trained:
            part.grad = gradients[i][rows]
        for group in self.adam.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)  # slices keep the memory of all gradients until the next backward
        self._num_steps += 1
        return Update(norm, norms)

    def discard(self) -> None:
        """Clear the gradients; nothing else changes."""
        for parameter in self.parameters:
            parameter.grad = None

    def moments(self, moment: str) -> list[RowShard]:
        """The rows of `moment` ("exp_avg" or "exp_avg_sq"), sharded as those of the parameters."""
        return [shard.with_tensor(rows) for shard, rows in zip(self.shards, self._moments[moment], strict=True)]

    @property
    def num_steps(self) -> int:
        """Steps that Adam's bias correction counts."""
        return self._num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        self._num_steps = value
        self._fill_state()

    def _take_gradients(self) -> list[Tensor]:
        gradients = []
        for parameter, shard, old in zip(self.parameters, self.shards, self._old, strict=True):
            gradient = parameter.grad
            if gradient is None:
                raise AssertionError(f"{shard.name} has no gradient")
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            if self.tied_group is not None and self.declared[shard.name].module is Module.EMBEDDING:
                # the first stage has the gradient of looking up, the last one that of the logits
                dist.all_reduce(local, group=self.tied_group)
            if self._lr_scale == 0:
                local[:old].zero_()  # or clipping would depend on what is not trained
            gradients.append(local)
            parameter.grad = None
        return gradients

    def _squares(self, gradients: Sequence[Tensor]) -> Tensor:
        """The squared norm of each logical parameter of the whole model, in canonical order: float64, [parameters].

        One axis is summed after the other, each over the same ranks whatever the size of "pp", whose sum only adds
        zeros: so the bits do not depend on how the layers are split into stages.
        """
        squares = torch.zeros(len(self.position), dtype=torch.float64, device=self.mesh.device)
        for shard, gradient in zip(self.shards, gradients, strict=True):
            if shard.is_writer:  # copies on other ranks would count twice
                squares[self.position[shard.name]] = torch.linalg.vector_norm(gradient).double().square()
        for axis in ("tp", "dp", "pp"):
            squares = all_reduce(squares, self.mesh.group(axis))
        return squares

    def _by_kind(self, squares: Sequence[float]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for parameter, square in zip(self.declared.values(), squares, strict=True):
            sums[parameter.kind] = sums.get(parameter.kind, 0.0) + square
        return {kind: math.sqrt(total) for kind, total in sums.items()}

    def _find_nonfinite(self, gradients: Iterable[Tensor]) -> dict[str, int]:
        world = self.mesh.world
        none = group_size(world)  # beyond every rank, so that MIN passes over it
        first = torch.full((len(self.position),), none, device=self.mesh.device)
        for shard, gradient in zip(self.shards, gradients, strict=True):
            if not math.isfinite(float(torch.linalg.vector_norm(gradient))):
                first[self.position[shard.name]] = group_rank(world)
        first = all_reduce(first, world, dist.ReduceOp.MIN)
        return {name: where for name, where in zip(self.position, first.tolist(), strict=True) if where != none}
