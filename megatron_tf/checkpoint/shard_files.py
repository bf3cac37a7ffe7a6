"""Shard files: plain safetensors files of pieces (row ranges of tensors), written and read in blocks of rows.

The safetensors library is not used: it writes whole tensors from memory, and its reader maps the file, so that every
touched page counts as memory of the process, up to the whole file. Here, a checkpoint larger than memory is streamed in
blocks of rows, and hashed on the way. Tests compare the files with that library.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.format import (
    DTYPE_NAMES,
    STORED_DTYPES,
    FileEntry,
    Groups,
    Piece,
    TensorEntry,
    check_tiling,
)
from megatron_tf.checkpoint.sequential_file import SequentialFile

_HASH_BYTES = 1 << 20  # bytes read at a time when they are only hashed
_NO_CHECKSUM = "0" * 32  # as long as one of xxh3_128
_LARGEST_HEADER = 100_000_000  # the limit of safetensors


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
        """Size of one row in bytes."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Size of the rows in bytes."""
        return (self.stop - self.start) * self.row_bytes


@dataclass(frozen=True)
class Written:
    """Files that were written, and the (group, spec, piece) of each piece in them."""

    files: dict[str, FileEntry]
    pieces: list[tuple[str, PieceSpec, Piece]]

    def add(self, other: "Written") -> None:
        """Add the files and pieces of `other`."""
        self.files.update(other.files)
        self.pieces.extend(other.pieces)


def planned_file(name: str, specs: Sequence[PieceSpec], group: str) -> Written:
    """Describe the file that `ShardFileWriter` would write, with its exact size and an empty checksum."""
    size = _file_size(_safetensors_header(specs, None), specs)
    return _as_written(name, specs, group=group, entry=FileEntry(size, _NO_CHECKSUM))


def _as_written(name: str, specs: Sequence[PieceSpec], *, group: str, entry: FileEntry) -> Written:
    return Written({name: entry}, [(group, spec, Piece(name, spec.start, spec.stop)) for spec in specs])


def _file_size(header: bytes, specs: Sequence[PieceSpec]) -> int:
    return 8 + len(header) + sum(spec.nbytes for spec in specs)


class ShardFileWriter:
    """Writes one safetensors file incrementally, in the order of `specs`, and computes its checksum on the way.

    Use it as a context manager, which makes the file durable on exit. `facts` is the metadata of the header, by default
    the row ranges in the file. Raises CheckpointError, naming the file, on a write error.
    """

    def __init__(self, path: Path, specs: Sequence[PieceSpec], facts: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.specs = specs
        self.hash = xxhash.xxh3_128()
        header = _safetensors_header(specs, facts)
        self.total_bytes = _file_size(header, specs)
        self.file = SequentialFile(path)
        self.bytes = 0
        self._append(len(header).to_bytes(8, "little") + header)

    def write(self, rows: Tensor) -> None:
        """Append the next rows."""
        self._append(bytes_of(rows.detach().cpu().contiguous()))

    def written(self, group: str) -> Written:
        """Describe the finished file, which contains tensors of `group`."""
        entry = FileEntry(self.bytes, self.hash.hexdigest())
        return _as_written(self.path.name, self.specs, group=group, entry=entry)

    def finish(self) -> None:
        """Flush the file to disk and close it."""
        assert self.bytes == self.total_bytes, f"{self.path}: {self.bytes} of {self.total_bytes} bytes"
        with self._naming_the_file():
            self.file.finish()

    def __enter__(self) -> "ShardFileWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None and not self.file.is_closed:  # after an error the caller removes the directory with this file
            self.finish()
        self.file.close()

    def _append(self, data: bytes | memoryview) -> None:
        self.hash.update(data)
        self.bytes += len(data)
        with self._naming_the_file():
            self.file.append(data)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Add the path to OSErrors raised within: those of an open file do not contain it."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror} after {self.file.bytes:,} bytes") from error


class HashedFile:
    """A file that is hashed while it is read. Each byte is hashed once; sequential reads need no second pass.

    It is opened for each read: a checkpoint may have more files than a process may hold open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.hash = xxhash.xxh3_128()
        self.hashed = 0

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `offset`; return how many there were."""
        with self.path.open("rb") as file:
            self._hash_up_to(file, offset)  # bytes that the caller skips are hashed too
            file.seek(offset)
            count = file.readinto(buffer)
        # when reads overlap or go back, skip the bytes that are already hashed
        self.hash.update(buffer[max(0, self.hashed - offset) : count])
        self.hashed = max(self.hashed, offset + count)
        return count

    def finish(self) -> str:
        """Hash the rest of the file and return the checksum."""
        with self.path.open("rb") as file:
            self._hash_up_to(file, self.size)
        return self.hash.hexdigest()

    def _hash_up_to(self, file: BinaryIO, stop: int) -> None:
        file.seek(self.hashed)
        while self.hashed < stop and (data := file.read(min(_HASH_BYTES, stop - self.hashed))):
            self.hash.update(data)
            self.hashed += len(data)


class ShardFileReader:
    """Reads rows of the tensors in one safetensors file directly into their destination.

    Raises CheckpointError if the file's header is not a valid safetensors header.
    """

    def __init__(self, path: Path, hashed: HashedFile | None = None) -> None:
        self.path = path
        self.hashed = hashed
        length = bytearray(8)
        self._fill(0, memoryview(length))
        self.data_start = 8 + int.from_bytes(length, "little")
        # before allocating memory for the header: the length in a damaged file can be anything
        if self.data_start > min(path.stat().st_size, _LARGEST_HEADER):
            raise CheckpointError(f"{path} is not a safetensors file: its header is said to end at {self.data_start}")
        header = bytearray(self.data_start - 8)
        self._fill(8, memoryview(header))
        try:
            self.tensors: Mapping[str, Any] = json.loads(header)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
        if not isinstance(self.tensors, dict):
            raise CheckpointError(f"{path} is not a safetensors file: its header is not an object")
        self._check_layout()

    def names(self) -> list[str]:
        """Names of the tensors in the file."""
        return [name for name in self.tensors if name != "__metadata__"]

    def whole(self, name: str) -> PieceSpec:
        """Return the spec of a tensor that is entirely in the file, as described in its header."""
        shape, dtype, _ = self._header_of(name)
        return PieceSpec(name, dtype, shape, start=0, stop=shape[0] if shape else 1)  # a scalar is one row

    def read(self, spec: PieceSpec, start: int, out: Tensor) -> None:
        """Fill `out` [rows, ...] with the tensor's rows from `start` on; `spec` is its description in the manifest."""
        self.check(spec)
        offset = self.tensors[spec.name]["data_offsets"][0] + (start - spec.start) * spec.row_bytes
        buffer = bytes_of(out)
        if self._fill(self.data_start + offset, buffer) != len(buffer):
            raise CheckpointError(f"{self.path} is damaged: {spec.name} ends early")

    def _fill(self, offset: int, buffer: memoryview) -> int:
        if self.hashed is not None:
            return self.hashed.read_into(offset, buffer)
        with self.path.open("rb") as file:  # for each read, as in HashedFile
            file.seek(offset)
            return file.readinto(buffer)

    def check(self, spec: PieceSpec) -> None:
        """Raise CheckpointError unless the file contains the rows of `spec`."""
        shape, dtype, (begin, end) = self._header_of(spec.name)
        expected = (spec.stop - spec.start, *spec.shape[1:])
        if (shape, dtype, end - begin) != (expected, spec.dtype, spec.nbytes) or begin < 0:
            raise CheckpointError(
                f"{self.path}: {spec.name} is {list(shape)} {dtype} in the file, "
                f"{list(expected)} {spec.dtype} in the manifest"
            )

    def _check_layout(self) -> None:
        """Raise CheckpointError unless the tensors fill the file without gaps, as safetensors requires."""
        places = []
        for name in self.names():
            try:
                begin, end = (int(offset) for offset in self.tensors[name]["data_offsets"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise CheckpointError(f"{self.path} does not say where {name!r} is stored") from error
            places.append((begin, end, name))
        # no hidden bytes between tensors and no overlapping tensors: each byte has exactly one meaning
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
        """Return the shape, the type, and the start and end offsets of a tensor."""
        try:
            found = self.tensors[name]
            begin, end = (int(offset) for offset in found["data_offsets"])
            return tuple(int(size) for size in found["shape"]), STORED_DTYPES[found["dtype"]], (begin, end)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path} does not hold {name}") from error


def collect_groups(written: Iterable[Written]) -> Groups:
    """Build the manifest entries from pieces in any order. Raises CheckpointError if rows are missing."""
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
    return text + b" " * (-len(text) % 8)  # as in the safetensors library: aligns the tensors of a mapped file


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a view of the memory of a contiguous CPU tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data
