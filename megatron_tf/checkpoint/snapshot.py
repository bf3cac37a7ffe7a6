"""Host copies of tensors, from which a checkpoint is written while training changes the tensors."""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_tf.checkpoint.save import Tensors
from megatron_tf.parallel.sharding import RowShard

Snapshot = dict[str, list[RowShard]]
"""Group of the checkpoint format -> copies of the rows that this rank writes."""
_ALIGNMENT = 512  # bytes: a multiple of the size of any element


class HostCopies:
    """Copies what a save writes; one save must be written before the next copies are taken.

    Copies from a GPU do not block the host: they go into one block of page-locked memory with the size of what this
    rank writes. The block is reused by later saves, because locking memory takes longer than copying into it.
    `thread` is the writing thread.
    """

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.thread = thread
        self._block: Tensor | None = None
        self._is_locked = False

    def take(self, tensors: Tensors) -> tuple[Snapshot, Callable[[], None]]:
        """Copy what this rank writes; returns the copies and a function that waits until they are complete."""
        mine = {group: [shard for shard in shards if shard.is_writer] for group, shards in tensors.items()}
        sources = [shard.tensor.detach() for shards in mine.values() for shard in shards]
        device = next((source.device for source in sources if source.is_cuda), None)
        if device is None:
            copies = [source.to("cpu", copy=True) for source in sources]
            wait = _wait_for_nothing
        else:
            copies = copy_into(self._block_for(sources, device), sources)
            wait = _wait_for_stream(device)
        remaining = iter(copies)
        return {group: [s.with_tensor(next(remaining)) for s in shards] for group, shards in mine.items()}, wait

    def close(self) -> None:
        """Free the memory; the copies must not be read afterwards."""
        if self._block is not None and self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())
        self._block, self._is_locked = None, False

    def _block_for(self, sources: Sequence[Tensor], device: torch.device) -> Tensor:
        size = sum(map(_room, sources))
        if self._block is None or len(self._block) != size:  # growth makes it larger
            self.close()
            block = self._block = torch.empty(size, dtype=torch.uint8)
            # on a thread that launches no kernels: after a failure, the next launch on the thread would raise its error
            self._is_locked = self.thread.submit(_lock, block, device).result()
            if not self._is_locked:
                message = f"{size:,} bytes of host memory can't be page-locked: saves wait for the GPU"
                warnings.warn(message, stacklevel=2)
        return self._block


def copy_into(block: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors one after another into `block`, bytes on the host; returns the copies as views of it.

    The host does not wait for a GPU if the block is page-locked.
    """
    parts = block.split([_room(source) for source in sources])
    copies = [
        part[: source.nbytes].view(source.dtype).view(source.shape) for part, source in zip(parts, sources, strict=True)
    ]
    for copy, source in zip(copies, sources, strict=True):
        copy.copy_(source, non_blocking=True)
    return copies


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _lock(block: Tensor, device: torch.device) -> bool:
    """Page-lock memory for a device; returns whether the system allows it."""
    with torch.cuda.device(device):  # a thread starts on the first GPU
        return not int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))


def _wait_for_stream(device: torch.device) -> Callable[[], None]:
    """Return a function that waits, on any thread, for all work submitted to the device so far."""
    event = torch.cuda.Event(blocking=True)  # waits without spinning
    event.record(torch.cuda.current_stream(device))

    def wait() -> None:
        with torch.cuda.device(device):
            event.synchronize()

    return wait


def _wait_for_nothing() -> None:
    """Return immediately: copies on a CPU are complete already."""
