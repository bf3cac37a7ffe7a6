"""Counts what makes the host wait for a GPU, on a machine without one: the meta device stands for it."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

SIZED_BY_VALUES = {
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,
}
"""What needs values to know the shape of its result, or gives it to the host."""


class HostWaits(TorchDispatchMode):
    """Records what happens to tensors on `device` while it is entered, by name of the operation.

    `reads` are those that wait for a value; ones stand for the values that the meta device has not. `copies` are those
    of tensors on the host to the device, which wait unless they are pinned and non-blocking; `blocking` are the ones
    among them that wait in any case.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.reads: list[str] = []
        self.copies: list[str] = []
        self.blocking: list[str] = []

    def __enter__(self):
        self._from_numbers = _FromNumbers(self)
        self._from_numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._from_numbers.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, kind = kwargs or {}, func.overloadpacket
        if kind is aten._local_scalar_dense and self.is_on_device(args[0]):
            self.reads.append(str(kind))
            return 1.0 if args[0].is_floating_point() else 1
        if kind is aten._to_copy:
            return self._to_copy(func, args, kwargs)
        if kind is aten.copy_:
            return self._copy(func, args, kwargs)
        if self._is_sized_by_values(kind, args):
            self.reads.append(str(kind))
        return func(*args, **kwargs)

    def _to_copy(self, func, args, kwargs):
        target = torch.device(kwargs.get("device") or args[0].device)
        if self.is_on_device(args[0]) and target.type == "cpu":
            self.reads.append("to")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if args[0].device.type == "cpu" and target.type == self.device.type:
            self.record_copy("to", kwargs.get("non_blocking", False))
        return func(*args, **kwargs)

    def _copy(self, func, args, kwargs):
        into, source = args[:2]
        if self.is_on_device(source) and into.device.type == "cpu":
            self.reads.append("copy_")
            return into.fill_(1)
        if source.device.type == "cpu" and self.is_on_device(into):
            self.record_copy("copy_", kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        return func(*args, **kwargs)

    def _is_sized_by_values(self, kind, args) -> bool:
        if kind in (aten.index, aten.index_put, aten.index_put_):  # the places of a mask have to be found first
            tensors = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        else:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and kind in SIZED_BY_VALUES]
        return any(map(self.is_on_device, tensors))

    def record_copy(self, name: str, is_non_blocking: bool) -> None:
        self.copies.append(name)
        if not is_non_blocking:
            self.blocking.append(name)

    def is_on_device(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device.type


class _FromNumbers(TorchFunctionMode):
    """Sees torch.tensor(..., device=...), whose copy is made below the level of TorchDispatchMode."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and self.waits.is_on_device(result):
            self.waits.record_copy(func.__name__, False)
        return result
