"""Shard files: plain safetensors that hold pieces, row ranges of tensors, written and read some rows at a time.

The safetensors library is not used: it writes whole tensors from memory, and its reader maps the file, where every page
it touches counts as the process's memory, up to the whole file. Here, a checkpoint larger than the memory streams
through blocks of rows, and is hashed on the way. Tests hold the files against that library.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_tf.checkpoint.format import (
    DTYPE_NAMES,
    STORED_DTYPES,
    CheckpointError,
    FileEntry,
    Groups,
    Piece,
    TensorEntry,
    check_tiling,
)
from megatron_tf.files import sync_file

_HASH_BYTES = 1 << 20  # read at a time where bytes are only hashed
_LARGEST_HEADER = 100_000_000  # as safetensors has it


@dataclass(frozen=True)
class PieceSpec:
    """Rows [start, stop) of the tensor `name` of global `shape`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return (self.stop - self.start) * self.row_bytes


@dataclass(frozen=True)
class Written:
    """Files that were written, and the (group, spec, piece) of what is in them."""

    files: dict[str, FileEntry]
    pieces: list[tuple[str, PieceSpec, Piece]]


class ShardFileWriter:
    """Writes one safetensors file whose tensors arrive row by row, in the order of `specs`, and hashes it as it goes.

    Used as a context manager: leaving it makes the file durable. `facts` are the header's metadata, by default which
    rows are in the file. Raises OSError as the disk does.
    """

    def __init__(self, path: Path, specs: Sequence[PieceSpec], facts: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.specs = specs
        self.hash = xxhash.xxh3_128()
        self.bytes = 0
        header = _safetensors_header(specs, facts)
        self.total_bytes = 8 + len(header) + sum(spec.nbytes for spec in specs)
        # unbuffered: blocks of rows are large, and what was hashed and counted has reached the system
        self.file = path.open("xb", buffering=0)
        self._append(len(header).to_bytes(8, "little") + header)

    def write(self, rows: Tensor) -> None:
        """Append the next rows."""
        self._append(bytes_of(rows.detach().cpu().contiguous()))

    def written(self, group: str) -> Written:
        """What the file, of tensors of `group`, has become."""
        pieces = [(group, spec, Piece(self.path.name, spec.start, spec.stop)) for spec in self.specs]
        return Written({self.path.name: FileEntry(self.bytes, self.hash.hexdigest())}, pieces)

    def finish(self) -> None:
        """Make the file durable, and close it."""
        assert self.bytes == self.total_bytes, f"{self.path}: {self.bytes} of {self.total_bytes} bytes"
        with self.file, self._naming_the_file():
            sync_file(self.file)

    def __enter__(self) -> "ShardFileWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None and not self.file.closed:  # after an error the caller removes the directory, and this file
            self.finish()
        self.file.close()

    def _append(self, data: bytes | memoryview) -> None:
        self.hash.update(data)
        left = memoryview(data)
        with self._naming_the_file():
            while left:  # an unbuffered write may take less than it is given
                count = self.file.write(left)
                self.bytes += count
                left = left[count:]

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """The system's errors about an open file do not say which it is."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror} after {self.bytes:,} bytes") from error


class HashedFile:
    """A file that is hashed while it is read: each byte once, and reads in its order need no other pass."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.file = path.open("rb", buffering=0)
        self.hash = xxhash.xxh3_128()
        self.hashed = 0

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `offset`; returns how many there were."""
        self._hash_up_to(offset)  # what the caller skips counts as well
        self.file.seek(offset)
        count = self.file.readinto(buffer)
        # where reads overlap, or go back, the bytes that are hashed already are left out
        self.hash.update(buffer[max(0, self.hashed - offset) : count])
        self.hashed = max(self.hashed, offset + count)
        return count

    def finish(self) -> str:
        """The checksum of the whole file, which is closed."""
        with self.file:
            self._hash_up_to(self.size)
        return self.hash.hexdigest()

    def _hash_up_to(self, stop: int) -> None:
        self.file.seek(self.hashed)
        while self.hashed < stop and (data := self.file.read(min(_HASH_BYTES, stop - self.hashed))):
            self.hash.update(data)
            self.hashed += len(data)


class ShardFileReader:
    """Reads rows of the tensors of one safetensors file straight into their place.

    Raises CheckpointError where the file's header is not that of a safetensors file.
    """

    def __init__(self, path: Path, hashed: HashedFile | None = None) -> None:
        self.path = path
        self.hashed = hashed
        length = bytearray(8)
        self._fill(0, memoryview(length))
        self.data_start = 8 + int.from_bytes(length, "little")
        # before memory is taken for a header: the length in a damaged file can be anything
        if self.data_start > min(path.stat().st_size, _LARGEST_HEADER):
            raise CheckpointError(f"{path} is not a safetensors file: its header is said to end at {self.data_start}")
        header = bytearray(self.data_start - 8)
        self._fill(8, memoryview(header))
        try:
            self.tensors: Mapping[str, Any] = json.loads(header)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
        if not isinstance(self.tensors, dict):
            raise CheckpointError(f"{path} is not a safetensors file: its header is no object")
        self._check_layout()

    def names(self) -> list[str]:
        """Tensors in the file."""
        return [name for name in self.tensors if name != "__metadata__"]

    def whole(self, name: str) -> PieceSpec:
        """Return the spec of a tensor of which the file holds all rows, as its header describes it."""
        shape, dtype, _ = self._header_of(name)
        return PieceSpec(name, dtype, shape, start=0, stop=shape[0] if shape else 1)  # a scalar is one row

    def read(self, spec: PieceSpec, start: int, out: Tensor) -> None:
        """Fill `out` [rows, ...] with the rows from `start` of the tensor; `spec` is what the manifest says of it."""
        self.check(spec)
        offset = self.tensors[spec.name]["data_offsets"][0] + (start - spec.start) * spec.row_bytes
        buffer = bytes_of(out)
        if self._fill(self.data_start + offset, buffer) != len(buffer):
            raise CheckpointError(f"{self.path} is damaged: {spec.name} ends early")

    def _fill(self, offset: int, buffer: memoryview) -> int:
        if self.hashed is not None:
            return self.hashed.read_into(offset, buffer)
        # opened for each read: a checkpoint may have more files than a process may hold open
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.readinto(buffer)

    def check(self, spec: PieceSpec) -> None:
        """Raise CheckpointError unless the file holds these rows."""
        shape, dtype, (begin, end) = self._header_of(spec.name)
        expected = (spec.stop - spec.start, *spec.shape[1:])
        if (shape, dtype, end - begin) != (expected, spec.dtype, spec.nbytes) or begin < 0:
            raise CheckpointError(
                f"{self.path}: {spec.name} is {list(shape)} {dtype} in the file, "
                f"{list(expected)} {spec.dtype} in the manifest"
            )

    def _check_layout(self) -> None:
        """Raise CheckpointError unless the tensors fill the file one after another, as safetensors demands."""
        places = []
        for name in self.names():
            try:
                begin, end = (int(offset) for offset in self.tensors[name]["data_offsets"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise CheckpointError(f"{self.path} does not say where {name!r} is stored") from error
            places.append((begin, end, name))
        # nothing hides between tensors, and no tensor aliases another: each byte has one meaning
        position = 0
        for begin, end, name in sorted(places):
            if begin != position or end < begin:
                raise CheckpointError(
                    f"{self.path} is not a safetensors file: {name} is said to be stored at [{begin}, {end}), expected "
                    f"a start at {position}: tensors share bytes, or bytes belong to none"
                )
            position = end
        size = self.path.stat().st_size - self.data_start
        if places and position > size:
            raise CheckpointError(f"{self.path} is damaged: {max(places)[2]} ends early")
        if position < size:
            raise CheckpointError(f"{self.path} is not a safetensors file: {size - position} bytes belong to no tensor")

    def _header_of(self, name: str) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
        """Return shape, type, and begin and end of the bytes of a tensor."""
        try:
            found = self.tensors[name]
            begin, end = (int(offset) for offset in found["data_offsets"])
            return tuple(int(size) for size in found["shape"]), STORED_DTYPES[found["dtype"]], (begin, end)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path} does not hold {name}") from error


def collect_groups(written: Iterable[Written]) -> Groups:
    """Make the entries of tensors from their pieces, in any order. Raises CheckpointError where rows are missing."""
    found: dict[str, dict[str, list[tuple[PieceSpec, Piece]]]] = {}
    for part in written:
        for group, spec, piece in part.pieces:
            found.setdefault(group, {}).setdefault(spec.name, []).append((spec, piece))
    groups = {}
    for group, tensors in found.items():
        groups[group] = {name: _entry(f"{group} {name}", parts) for name, parts in tensors.items()}
    return groups


def _entry(what: str, parts: list[tuple[PieceSpec, Piece]]) -> TensorEntry:
    spec = parts[0][0]
    for other, _ in parts:
        if (other.shape, other.dtype) != (spec.shape, spec.dtype):
            raise CheckpointError(f"{what}: ranks disagree on its shape: {other.shape} and {spec.shape}")
    pieces = sorted((piece for _, piece in parts), key=lambda piece: piece.start)
    entry = TensorEntry(DTYPE_NAMES[spec.dtype], spec.shape, tuple(pieces))
    check_tiling(what, entry)
    return entry


def _safetensors_header(specs: Sequence[PieceSpec], facts: Mapping[str, str] | None) -> bytes:
    rows = {spec.name: [spec.start, spec.stop] for spec in specs}
    header: dict[str, Any] = {"__metadata__": facts or {"rows": json.dumps(rows)}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": [spec.stop - spec.start, *spec.shape[1:]],
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # as the safetensors library does: numbers in a mapped file are aligned


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.flatten().view(torch.uint8).numpy().data
