"""Safely reads tensors from a file written by torch.save: a zip archive of a pickle and the bytes of storages.

Records are located through the zip directory and checked against its checksums, so any valid zip of the same records
works, compressed or not. The pickle can only build tensors: no name in it is imported, so it can't run code.
"""

import lzma
import math
import pickle
import pickletools
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.shard_files import bytes_of
from megatron_tf.convert.external import ExternalTensor

_MOST_PICKLE_BYTES = 1 << 26
_BLOCK_BYTES = 1 << 20
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Type:
    """Placeholder for torch's storage class of one data type."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    """Storage whose values are in one record of the zip."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Strided:
    """A tensor as described by the pickle, not validated yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# The next two are created for each use and have no attributes, unlike functions: a pickle can set attributes of the
# objects it gets (opcode BUILD), such as a function's defaults.


class _Rebuild:
    """Placeholder for torch's functions that build a tensor from a storage."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> _Strided:
        return _Strided(storage, offset, shape=tuple(shape), strides=tuple(strides))


class _Parameter:
    """Placeholder for torch's function that turns a tensor into a parameter."""

    __slots__ = ()

    def __call__(self, tensor: Any, *others: Any) -> Any:
        return tensor


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # everything that a pickle may name: nothing is imported, and these only describe tensors
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Parameter()
        if module == "torch" and name in _STORAGES:
            return _Type(_STORAGES[name])
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, count = pid  # the fourth item is the device it was on
        if kind != "storage" or not isinstance(storage_type, _Type) or not isinstance(key, str) or not _is_count(count):
            raise pickle.UnpicklingError(f"it names {pid!r}, which is not a storage")
        return _Storage(storage_type.dtype, key, count)


class ZippedTensors:
    """Named tensors in the zip at `path`. Raises CheckpointError if it contains anything else, or if a record is
    damaged, missing, duplicated, or too small for its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._naming_the_file():
            self._zip = zipfile.ZipFile(path)
            self._records = self._by_name()
            self._root = self._find_root()
            self._is_swapped = self._has_other_byte_order()
            state = self._unpickle()
        self._checked: set[str] = set()
        self._open: tuple[str, IO[bytes]] | None = None
        if not isinstance(state, dict) or not state:
            raise CheckpointError(f"{path} holds {type(state).__name__}, not tensors by name")
        self._state: dict[Any, Any] = dict(state)
        for name, value in self._state.items():
            if not isinstance(name, str) or not isinstance(value, _Strided):
                raise CheckpointError(f"{path} holds more than tensors: {name!r} is {type(value).__name__}")

    def tensors(self) -> dict[str, ExternalTensor]:
        """Return all tensors by name, validated against the records that store them."""
        with self._naming_the_file():
            return {name: self._external(name, tensor) for name, tensor in self._state.items()}

    def _by_name(self) -> dict[str, zipfile.ZipInfo]:
        records: dict[str, zipfile.ZipInfo] = {}
        for record in self._zip.infolist():
            if record.filename in records:
                raise CheckpointError(f"{self.path} holds {record.filename!r} twice")
            records[record.filename] = record
        return records

    def _find_root(self) -> str:
        found = [name for name in self._records if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1:
            raise CheckpointError(f"{self.path} can't be read as plain tensors: it holds {len(found)} files data.pkl")
        return found[0].removesuffix("data.pkl")

    def _has_other_byte_order(self) -> bool:
        record = self._records.get(f"{self._root}byteorder")
        if record is None:  # torch before 2.1 writes no such record, and always uses the machine's byte order
            return False
        order = self._read_whole(record, 16).decode("ascii", errors="replace")
        if order not in ("little", "big"):
            raise CheckpointError(f"{self.path}: its byte order is {order!r}, expected little or big")
        return order != sys.byteorder

    def _unpickle(self) -> Any:
        text = self._read_whole(self._records[f"{self._root}data.pkl"], _MOST_PICKLE_BYTES)
        # a large memo index would allocate memory for all smaller ones
        for opcode, argument, _ in pickletools.genops(text):
            if "PUT" in opcode.name and isinstance(argument, int) and argument > len(text):
                raise pickle.UnpicklingError(f"it stores a value at {argument}")
        return _Unpickler(BytesIO(text), encoding="utf-8").load()

    def _read_whole(self, record: zipfile.ZipInfo, most_bytes: int) -> bytes:
        if record.file_size > most_bytes:
            raise CheckpointError(f"{self.path}: {record.filename} has {record.file_size:,} bytes, which is too many")
        return self._zip.read(record)

    def _external(self, name: str, tensor: _Strided) -> ExternalTensor:
        storage = tensor.storage
        if not isinstance(storage, _Storage) or not all(map(_is_count, (tensor.offset, *tensor.shape))):
            raise CheckpointError(f"{self.path}: {name} has shape {list(tensor.shape)} or a storage that cannot be")
        record = self._records.get(f"{self._root}data/{storage.key}")
        size = storage.dtype.itemsize
        if record is None or record.file_size != storage.count * size:
            raise CheckpointError(
                f"{self.path} is damaged: {name} is stored in {storage.key!r} of {storage.count * size:,} bytes, "
                f"{'which is missing' if record is None else f'which has {record.file_size:,}'}"
            )
        # rows are read as contiguous bytes; any other view would silently be read wrong
        if tensor.strides != _contiguous_strides(tensor):
            raise CheckpointError(f"{self.path}: {name} is not contiguous: save the file again, each tensor by clone()")
        if tensor.offset + math.prod(tensor.shape) > storage.count:
            raise CheckpointError(
                f"{self.path}: {name} is {list(tensor.shape)} from {tensor.offset:,} on, and its storage has "
                f"{storage.count:,} numbers"
            )
        start, row_bytes = tensor.offset * size, math.prod(tensor.shape[1:]) * size

        def read_rows(first: int, stop: int) -> Tensor:
            rows = torch.empty((stop - first, *tensor.shape[1:]), dtype=storage.dtype)
            self._fill(record, start + first * row_bytes, rows)
            return rows

        return ExternalTensor(tensor.shape, storage.dtype, read_rows)

    def _fill(self, record: zipfile.ZipInfo, offset: int, rows: Tensor) -> None:
        buffer = bytes_of(rows)
        with self._naming_the_file():
            self._compare_checksum(record)
            file = self._at(record, offset)
            place = 0
            while place < len(buffer):
                block = file.read(min(_BLOCK_BYTES, len(buffer) - place))
                if not block:
                    raise EOFError(f"{record.filename} ends early")
                buffer[place : place + len(block)] = block
                place += len(block)
        # swapped in place after reading, since blocks of the zip may end within a number
        if self._is_swapped and rows.dtype.itemsize > 1:
            numbers = rows.view(torch.uint8).view(-1, rows.dtype.itemsize)
            numbers.copy_(numbers.flip(1))

    def _at(self, record: zipfile.ZipInfo, offset: int) -> IO[bytes]:
        """Return a file at `offset` of the record; the last one is kept open because most reads are sequential."""
        if self._open is None or self._open[0] != record.filename or self._open[1].tell() > offset:
            if self._open is not None:
                self._open[1].close()
            self._open = record.filename, self._zip.open(record)
        self._open[1].seek(offset)
        return self._open[1]

    def _compare_checksum(self, record: zipfile.ZipInfo) -> None:
        """Verify a record once: reading to its end compares it with the CRC-32 in the zip directory."""
        if record.filename in self._checked:
            return
        with self._zip.open(record) as file:
            while file.read(_BLOCK_BYTES):
                pass
        self._checked.add(record.filename)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Convert any error of zipfile and pickle for invalid files to a CheckpointError of one line."""
        try:
            yield
        except CheckpointError:
            raise
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}") from error
        except (pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{self.path} can't be read as plain tensors: {error}") from error
        except (RuntimeError, MemoryError) as error:  # encrypted, unknown compression, nested too deeply
            raise CheckpointError(f"{self.path} can't be read as plain tensors: {error!r}") from error


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62  # bool is an int to Python; torch's sizes have 64 bits


def _contiguous_strides(tensor: _Strided) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape; size-1 dimensions and empty tensors keep theirs."""
    if 0 in tensor.shape or len(tensor.strides) != len(tensor.shape):
        return tensor.strides if len(tensor.strides) == len(tensor.shape) else (-1,)
    expected: list[int] = []
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        expected.append(stride if size == 1 else step)
        step *= size
    return tuple(reversed(expected))
