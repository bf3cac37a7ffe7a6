"""Files of rows: plain safetensors, written and read some rows at a time, so that no whole tensor is needed."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_tf.checkpoint.format import (
    DTYPE_NAMES,
    DTYPES,
    CheckpointError,
    FileEntry,
    Groups,
    Piece,
    TensorEntry,
    check_tiling,
)


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


class PieceFileWriter:
    """Writes one safetensors file whose tensors arrive row by row, in the order of `specs`, and hashes it as it goes.

    Used as a context manager: leaving it makes the file durable. Raises OSError as the disk does.
    """

    def __init__(self, path: Path, specs: Sequence[PieceSpec]) -> None:
        self.path = path
        self.specs = specs
        self.hash = xxhash.xxh3_128()
        self.bytes = 0
        header = _safetensors_header(specs)
        self.total_bytes = 8 + len(header) + sum(spec.nbytes for spec in specs)
        self.file = path.open("xb")
        self._append(len(header).to_bytes(8, "little") + header)

    def write(self, rows: Tensor) -> None:
        """Append the next rows."""
        self._append(_bytes_of(rows.detach().cpu().contiguous()))

    def written(self, group: str) -> Written:
        """What the file, of tensors of `group`, has become."""
        pieces = [(group, spec, Piece(self.path.name, spec.start, spec.stop)) for spec in self.specs]
        return Written({self.path.name: FileEntry(self.bytes, self.hash.hexdigest())}, pieces)

    def __enter__(self) -> "PieceFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.file:
            if error is None:
                assert self.bytes == self.total_bytes, f"{self.path}: {self.bytes} of {self.total_bytes} bytes"
                self.file.flush()
                os.fsync(self.file.fileno())

    def _append(self, data: bytes | memoryview) -> None:
        self.hash.update(data)
        self.bytes += self.file.write(data)


class PieceFileReader:
    """Rows of the tensors of one safetensors file, read straight into their place.

    Not by `safe_open`, which maps the file: every page it touches counts as the process's memory, up to the whole
    file. Raises CheckpointError where the file's header is not that of a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self.tensors: Mapping[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
        self.data_start = 8 + length

    def read(self, spec: PieceSpec, start: int, out: Tensor) -> None:
        """Fill `out` [rows, ...] with the rows from `start` of the tensor; `spec` is what the manifest says of it."""
        self._check(spec)
        offset = self.tensors[spec.name]["data_offsets"][0] + (start - spec.start) * spec.row_bytes
        buffer = _bytes_of(out)
        with self.path.open("rb") as file:
            file.seek(self.data_start + offset)
            if file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{self.path} is damaged: {spec.name} ends early")

    def _check(self, spec: PieceSpec) -> None:
        try:
            found = self.tensors[spec.name]
            begin, end = (int(offset) for offset in found["data_offsets"])
            shape, dtype = tuple(found["shape"]), DTYPES[found["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path} does not hold {spec.name}") from error
        expected = (spec.stop - spec.start, *spec.shape[1:])
        if (shape, dtype, end - begin) != (expected, spec.dtype, spec.nbytes) or begin < 0:
            raise CheckpointError(
                f"{self.path}: {spec.name} is {list(shape)} {dtype} in the file, "
                f"{list(expected)} {spec.dtype} in the manifest"
            )


def collect_groups(written: Iterable[Written]) -> Groups:
    """Entries of every tensor from its pieces, in any order; raises CheckpointError where rows are missing."""
    found: dict[str, dict[str, list[tuple[PieceSpec, Piece]]]] = {}
    for part in written:
        for group, spec, piece in part.pieces:
            found.setdefault(group, {}).setdefault(spec.name, []).append((spec, piece))
    return {
        group: {name: _entry(f"{group} {name}", parts) for name, parts in tensors.items()}
        for group, tensors in found.items()
    }


def _entry(what: str, parts: list[tuple[PieceSpec, Piece]]) -> TensorEntry:
    spec = parts[0][0]
    for other, _ in parts:
        if (other.shape, other.dtype) != (spec.shape, spec.dtype):
            raise CheckpointError(f"{what}: ranks disagree on its shape: {other.shape} and {spec.shape}")
    pieces = sorted((piece for _, piece in parts), key=lambda piece: piece.start)
    entry = TensorEntry(DTYPE_NAMES[spec.dtype], spec.shape, tuple(pieces))
    check_tiling(what, entry)
    return entry


def _safetensors_header(specs: Sequence[PieceSpec]) -> bytes:
    rows = {spec.name: [spec.start, spec.stop] for spec in specs}
    header: dict[str, Any] = {"__metadata__": {"rows": json.dumps(rows)}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": [spec.stop - spec.start, *spec.shape[1:]],
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
