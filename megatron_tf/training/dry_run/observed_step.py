"""Runs the real training step on tensors without values, and observes its messages and its memory."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tf.config import RunConfig
from megatron_tf.data.batch import Batch, DocumentMasking, make_batch
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.dry_run.collectives import CollectiveCounter, axis_of_group
from megatron_tf.training.dry_run.memory import StorageMeter
from megatron_tf.training.step.optimizer import MOMENTS
from megatron_tf.training.step.state import TrainState
from megatron_tf.training.step.step import train_step
from megatron_tf.training.supervision.signals import SignalCatcher
from megatron_tf.training.supervision.stop_signal import StopSignal

_aten = torch.ops.aten
_NO_ID = -1  # no document ends in the batch


class Observation(TorchDispatchMode):
    """Reports every operation to a counter of collectives and a meter of memory.

    Values that the host reads from a device without values are ones: finite, and no signal to stop.
    """

    def __init__(self, mesh: Mesh, meter: StorageMeter) -> None:
        super().__init__()
        self.counter = CollectiveCounter(axis_of_group(mesh))
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self.counter.see(func, args)
        elif func.overloadpacket is _aten._local_scalar_dense and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        elif func.overloadpacket is _aten._to_copy and args[0].is_meta and _is_host(kwargs.get("device")):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        self.meter.see(result)
        return result


def observe_step(state: TrainState, config: RunConfig) -> Observation:
    """Run a training step, as the loop does, on a batch of this rank; return what was observed."""
    mesh = state.mesh
    meter = StorageMeter(mesh.device, held_tensors(state))
    batch = blank_batch(config, mesh)
    stop_signal = StopSignal(mesh, SignalCatcher(), None)
    with Observation(mesh, meter) as observation, meter.following_resizes():
        train_step(state, batch, config.optimizer.lr)
        stop_signal.agree()
    return observation


def held_tensors(state: TrainState) -> list[Tensor]:
    """Return this rank's rows of the parameters and of the Adam moments."""
    shards = list(state.shards)
    for moment in MOMENTS:
        shards += state.optimizer.moments(moment)
    return [shard.tensor for shard in shards]


def blank_batch(config: RunConfig, mesh: Mesh) -> Batch:
    """Make this data-parallel rank's part of a full global batch, in which all ids are 0 and no document ends."""
    training, data = config.training, config.data
    count = training.global_batch_size // (training.micro_batch_size * mesh.size("dp"))
    ids = np.zeros((count, training.micro_batch_size, training.seq_length + 1), dtype=np.int64)
    numbers = np.arange(count * training.micro_batch_size).reshape(count, training.micro_batch_size)
    # without the data: a run has a mask of the loss for chat data, and for the padding of packed rows
    has_mask = data.loss_mask or data.packing == "best_fit"
    counts = np.ones((*numbers.shape, training.seq_length), dtype=np.bool_) if has_mask else None
    masking = DocumentMasking(_NO_ID, data.eod_mask_loss, data.reset_attention_mask)
    return make_batch(ids, numbers, masking, counts=counts)


def _is_host(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cpu"
