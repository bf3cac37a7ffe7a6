"""Counts what a part of the model does to a micro-batch: bytes kept and at the peak, operations, messages."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_tf.config import RunConfig
from megatron_tf.layers.casting import keeping_casts
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.sharding import local_tensor
from megatron_tf.planning.parts import PartName, keep_casts, runnable_part
from megatron_tf.training.dry_run.collectives import CollectiveCounter, Traffic
from megatron_tf.training.dry_run.fake_world import DEVICE
from megatron_tf.training.dry_run.memory import StorageMeter
from megatron_tf.training.dry_run.observed_step import Observation
from megatron_tf.training.step.state import TrainState

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
_NO_KERNEL = ("empty", "new_empty", "empty_like", "detach", "promote_types", "_unsafe_view")


@dataclass(frozen=True)
class Pass:
    """What one pass of a micro-batch through a part does on one rank."""

    kept: int
    """Bytes that it leaves, in addition to those before it: activations that backward reads, and its output."""
    peak: int
    """Most bytes within it, in addition to those before it."""
    product_flops: int
    """Floating-point operations of matrix products, two for each multiplication and addition."""
    attention_flops: int
    """Those of attention between tokens."""
    moved: int
    """Bytes that the other operations read and write, if each of them is a kernel."""
    kernels: int
    """Operations that start a kernel."""
    traffic: Sequence[Traffic]
    """Messages between the tensor-parallel and between the context-parallel ranks, each size for itself."""


@dataclass(frozen=True)
class PartCounts:
    """What a part does to a micro-batch."""

    forward: Pass
    backward: Pass
    """Recomputes what was not kept, and adds to gradients that exist."""


class PartCounter:
    """Counts parts of layouts, each kind of part once."""

    def __init__(self, device: torch.device = DEVICE) -> None:
        self.device = device
        self._known: dict[Any, PartCounts] = {}

    def count(self, config: RunConfig, name: PartName, layer: int = 0) -> PartCounts:
        """Count a part of a configuration; only a layer depends on which one it is, by its numbers of tokens."""
        key = part_key(config, name, layer)
        if key not in self._known:
            self._known[key] = _count(config, name, layer, device=self.device)
        return self._known[key]


def part_key(config: RunConfig, name: PartName, layer: int) -> tuple[Any, ...]:
    """Return everything that decides what a part does to a micro-batch."""
    model, training, parallel = config.model, config.training, config.parallel
    counts = tuple(model.token_counts(kind)[layer] for kind in model.token_kinds) if name == "layer" else ()
    ones: Any = {f"{kind}_tokens": 1 for kind in model.token_kinds}
    shape = dataclasses.replace(model, num_layers=1, **ones)
    recompute = training.recompute_granularity if name == "layer" else None
    batch = training.micro_batch_size, training.seq_length, training.precision
    ranks = parallel.tensor_model_parallel_size, parallel.sequence_parallel, parallel.tp_comm_overlap_chunks
    context = parallel.context_parallel_size, parallel.context_parallel_method
    return name, repr(shape), counts, recompute, *batch, *ranks, *context


def _count(config: RunConfig, name: PartName, layer: int, *, device: torch.device) -> PartCounts:
    with runnable_part(config, name, layer, device=device) as part, keeping_casts(part.state.model):
        meter = StorageMeter(device, _held(part.state))
        with _Counting(part.state.mesh, meter) as counting, meter.following_resizes():
            keep_casts(part.state)
            counting.lap()
            out = part.forward()
            forward = counting.lap()
            gradient = torch.empty_like(out)
            counting.lap()
            out.backward(gradient)
            backward = counting.lap()
    return PartCounts(forward, dataclasses.replace(backward, kept=-forward.kept))


def _held(state: TrainState) -> list[Tensor]:
    """Return this rank's rows of the parameters and of their gradients."""
    gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
    return [local_tensor(tensor) for tensor in (*state.model.parameters(), *gradients)]


class _Counting(Observation):
    """An observation that adds up one lap after the other."""

    def __init__(self, mesh: Mesh, meter: StorageMeter) -> None:
        super().__init__(mesh, meter)
        self._start()

    def _start(self) -> None:
        self.meter.peak = self._before = self.meter.bytes
        self.counter = CollectiveCounter(self.counter.axes)
        self._product_flops = self._attention_flops = self._moved = self._kernels = 0

    def lap(self) -> Pass:
        """Return what was counted since the last lap."""
        result = Pass(
            kept=self.meter.bytes - self._before,
            peak=self.meter.peak - self._before,
            product_flops=self._product_flops,
            attention_flops=self._attention_flops,
            moved=self._moved,
            kernels=self._kernels,
            traffic=self.counter.messages(),
        )
        self._start()
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in _NO_KERNEL:
            self._kernels += 1
            if name in _PRODUCTS:
                self._product_flops += _product_flops(*[each for each in args if isinstance(each, Tensor)][-2:])
            elif name.startswith("_scaled_dot_product"):
                self._attention_flops += _attention_flops(name, args)
            else:
                self._moved += sum(leaf.nbytes for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor))
        return result


def _product_flops(left: Tensor, right: Tensor) -> int:
    return 2 * left.numel() * right.shape[-1]


def _attention_flops(name: str, args: Any) -> int:
    """Count two products in forward and five in backward, of all pairs of queries and keys, or half if it is causal."""
    is_backward = "backward" in name
    query, key = args[1:3] if is_backward else args[:2]
    is_causal = any(each is True for each in args)  # a default argument, False, is left out
    products = 5 if is_backward else 2
    return products * query.numel() * key.shape[-2] * (1 if is_causal else 2)
