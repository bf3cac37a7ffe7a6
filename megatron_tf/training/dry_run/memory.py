"""Measures the memory of a device that has none: the bytes of storages that exist, and their peak."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

_resize = torch.UntypedStorage.resize_


class StorageMeter:
    """Adds up the bytes of the storages of `device` that it has seen and that still exist."""

    def __init__(self, device: torch.device, held: Iterable[Tensor]) -> None:
        self.device = device
        self.bytes = 0
        """Bytes now."""
        self.peak = 0
        """Largest number of bytes so far."""
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.see(list(held))

    def see(self, results: Any) -> None:
        """Add the storages of the tensors in `results` that are not known yet."""
        # most operations return one tensor, and looking for others would take a quarter of a dry run's time
        for leaf in [results] if isinstance(results, Tensor) else tree_leaves(results):
            # a DTensor has no storage of its own, and what computes its local tensor is not seen
            local = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
            if isinstance(local, Tensor) and local.device.type == self.device.type:
                storage = local.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage)

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Notice storages that are resized, as FSDP does to free and to allocate gathered parameters."""

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = _resize(storage, size)
            if storage._cdata in self._known:
                reference, before = self._known[storage._cdata]
                self._known[storage._cdata] = reference, size
                self._change(size - before)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = _resize  # type: ignore[method-assign]

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def forget(_: object) -> None:
            self._change(-self._known.pop(key)[1])

        self._known[key] = weakref.ref(storage, forget), size
        self._change(size)

    def _change(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
