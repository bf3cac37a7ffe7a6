"""A world of which only one rank exists: process groups that exchange nothing, and tensors without values.

The code of a run is used as it is, on the meta device, which it treats like a GPU.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_tf.config import KernelsConfig
from megatron_tf.parallel.mesh import Mesh, build_mesh

DEVICE = torch.device("meta")
META_KERNELS = KernelsConfig(pattention="eager", attention="sdpa", norm="torch", optimizer="torch")
"""Kernels that run on the meta device; others exchange the same messages."""


@contextmanager
def fake_rank(
    rank: int,
    *,
    tensor: int,
    pipeline: int,
    data: int,
    context: int = 1,
    shard_size: int | None = None,
    device: torch.device = DEVICE,
) -> Iterator[Mesh]:
    """Join, as `rank`, a world of pipeline x data x context x tensor ranks that exchanges nothing, and yield its mesh.

    The rank is on `device`: the meta device, or a CPU, on which it computes with values.

    torch.distributed must not be initialized in this process; it is finalized at the end.
    """
    size = tensor * pipeline * data * context
    if size == 1:
        yield Mesh(device)
        return
    hook = sys.excepthook  # torch wraps it in another one for each world, which names the rank
    # the host communicates, too
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=size)
    # torch sets none if there are several backends, and then warns when the world ends
    dist.distributed_c10d._get_default_group()._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)
    try:
        with _meta_as_accelerator():
            yield build_mesh(
                device, tensor=tensor, pipeline=pipeline, data=data, context=context, shard_size=shard_size
            )
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
        _clear_sharding_prop_cache()  # it would return meshes of this world to the next one


class _Event:
    """An event on a device that computes nothing."""

    def record(self, stream: object = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class _Stream:
    """A stream of a device that computes nothing."""

    def __init__(self, priority: int = 0) -> None:
        pass

    def record_event(self) -> _Event:
        """Return an event: FSDP expects one from every device but a CPU."""
        return _Event()

    def wait_event(self, event: object) -> None:
        """Do nothing."""

    def wait_stream(self, stream: object) -> None:
        """Do nothing."""


class _MetaDevice:
    """What FSDP calls in `torch.cuda`, for the meta device."""

    Event = _Event
    Stream = _Stream
    stream = nullcontext

    @staticmethod
    def current_stream() -> _Stream:
        """Return a stream; all of them are alike."""
        return _Stream()

    @staticmethod
    def current_device() -> int:
        """Return the index of the only meta device."""
        return 0

    @staticmethod
    def device_count() -> int:
        """Return the number of meta devices of a host."""
        return 1

    @staticmethod
    def is_initialized() -> bool:
        """Return that the device needs no initialization."""
        return True


@contextmanager
def _meta_as_accelerator() -> Iterator[None]:
    """Let FSDP compute on the meta device.

    torch has no public way: FSDP looks for the functions of a device in `torch.<its type>`, and refuses parameters
    on the meta device because they usually have been forgotten there.
    """
    refuse = FSDPParamGroup._validate_no_meta_params
    FSDPParamGroup._validate_no_meta_params = lambda self: None  # type: ignore[method-assign]
    torch.meta = _MetaDevice  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del torch.meta  # type: ignore[attr-defined]
        FSDPParamGroup._validate_no_meta_params = refuse  # type: ignore[method-assign]
