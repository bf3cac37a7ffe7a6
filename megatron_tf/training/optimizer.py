"""AdamW over the rows this rank holds, with clipping by a global norm that no layout changes the order of."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from megatron_tf.config import OptimizerConfig
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.sharding import RowShard

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (arXiv 1711.05101) on the local rows of each parameter.

    Working on plain local tensors keeps every layout on one path: what is sharded over ranks is elementwise here.
    `shards` name the rows behind `parameters`, in the same order; `canonical_names` are all parameters of the whole
    model. `tied_group` joins the stages that hold a copy of the embedding, if they are two.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        shards: Sequence[RowShard],
        canonical_names: Sequence[str],
        config: OptimizerConfig,
        mesh: Mesh,
        tied_group: ProcessGroup | None = None,
    ) -> None:
        self.parameters = parameters
        self.shards = shards
        self.config = config
        self.mesh = mesh
        self.tied_group = tied_group
        self.position = {name: i for i, name in enumerate(canonical_names)}
        decayed = [s.tensor for s in shards if not s.name.startswith("final_norm.")]
        others = [s.tensor for s in shards if s.name.startswith("final_norm.")]
        self.adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ]
            if others
            else [{"params": decayed, "weight_decay": config.weight_decay}],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        for shard in shards:
            self.adam.state[shard.tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.tensor.device),
                **{moment: torch.zeros_like(shard.tensor) for moment in MOMENTS},
            }

    def step(self, lr: float, scale: float = 1.0) -> float:
        """Apply the gradients in the parameters' .grad times `scale` and clear them; their norm before clipping."""
        gradients = self._take_gradients()
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        norm = self._global_norm(gradients)
        limit = self.config.clip_grad
        if limit and norm > limit:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        for shard, gradient in zip(self.shards, gradients, strict=True):
            shard.tensor.grad = gradient
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def moments(self, moment: str) -> list[RowShard]:
        """The rows of `moment` ("exp_avg" or "exp_avg_sq") beside those of the parameters."""
        return [shard.with_tensor(self.adam.state[shard.tensor][moment]) for shard in self.shards]

    @property
    def num_steps(self) -> int:
        """Steps that Adam's bias correction counts."""
        return int(self.adam.state[self.shards[0].tensor]["step"].item())

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        for shard in self.shards:
            self.adam.state[shard.tensor]["step"].fill_(value)

    def _take_gradients(self) -> list[Tensor]:
        gradients = []
        for parameter, shard in zip(self.parameters, self.shards, strict=True):
            gradient = parameter.grad
            if gradient is None:
                raise AssertionError(f"{shard.name} has no gradient")
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            if shard.name == "embedding.weight" and self.tied_group is not None:
                dist.all_reduce(local, group=self.tied_group)
            gradients.append(local)
            parameter.grad = None
        return gradients

    def _global_norm(self, gradients: Iterable[Tensor]) -> float:
        """Root of the sum of squares over all logical parameters, each counted once, summed in canonical order.

        One axis is summed after the other, each over the same ranks whatever the size of "pp", whose sum only adds
        zeros: so the bits do not depend on how the layers are split into stages.
        """
        squares = torch.zeros(len(self.position), dtype=torch.float64, device=self.mesh.device)
        for shard, gradient in zip(self.shards, gradients, strict=True):
            if shard.writer:
                squares[self.position[shard.name]] = torch.linalg.vector_norm(gradient).double().square()
        for axis in ("tp", "dp", "pp"):
            group = self.mesh.group(axis)
            if group is not None:
                dist.all_reduce(squares, group=group)
        return float(squares.sum().sqrt())
