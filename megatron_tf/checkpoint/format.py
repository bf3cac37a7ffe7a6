"""The checkpoint format: safetensors files and JSON, described in docs/checkpoint_format.md. Nothing is pickled.

A tensor is cut by rows only, so a piece of it is a row range, and a file is a row range of each tensor it holds.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

FORMAT_VERSION = 1
MANIFEST, METADATA, LATEST = "manifest.json", "metadata.json", "latest"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that is not there, damaged, or of something else: the message names the file or tensor."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a logical tensor, and the file that holds them."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorEntry:
    """A logical tensor: its type by safetensors' name, its global shape, its pieces in row order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum of a file."""

    bytes: int
    xxh3_128: str


Groups = Mapping[str, Mapping[str, TensorEntry]]
"""Group ("model", "exp_avg", "exp_avg_sq") -> logical name -> entry."""


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint consists of."""

    files: Mapping[str, FileEntry]
    groups: Groups

    def to_json(self) -> str:
        """The manifest as text that carries its own checksum."""
        body = {
            "format_version": FORMAT_VERSION,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "groups": {
                group: {name: asdict(entry) for name, entry in tensors.items()}
                for group, tensors in self.groups.items()
            },
        }
        return json.dumps(body | {"xxh3_128": _checksum_of(body)}, indent=1)


@dataclass(frozen=True)
class PieceSpec:
    """Rows [start, stop) of the tensor `name` of `shape`, about to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return (self.stop - self.start) * torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


class PieceFileWriter:
    """Writes one safetensors file whose tensors arrive row by row, in the order of `specs`, and sums it up as it goes.

    Used as a context manager: leaving it makes the file durable. Raises OSError as the disk does.
    """

    def __init__(self, path: Path, specs: Sequence[PieceSpec]) -> None:
        self.path = path
        self.specs = specs
        self.expected = sum(spec.nbytes for spec in specs)
        self.hash = xxhash.xxh3_128()
        self.bytes = 0
        self.file = path.open("xb")
        header = _safetensors_header(specs)
        self._append(len(header).to_bytes(8, "little") + header)
        self.header_bytes = self.bytes

    def write(self, rows: Tensor) -> None:
        """Append the next rows."""
        self._append(rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def entry(self) -> FileEntry:
        """Size and checksum of what was written."""
        return FileEntry(self.bytes, self.hash.hexdigest())

    def pieces(self) -> list[tuple[PieceSpec, Piece]]:
        """What the file holds."""
        return [(spec, Piece(self.path.name, spec.start, spec.stop)) for spec in self.specs]

    def __enter__(self) -> "PieceFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.file:
            if error is None:
                if self.bytes - self.header_bytes != self.expected:
                    raise AssertionError(
                        f"{self.path}: {self.bytes - self.header_bytes} of {self.expected} bytes written"
                    )
                self.file.flush()
                os.fsync(self.file.fileno())

    def _append(self, data: bytes | memoryview) -> None:
        self.hash.update(data)
        self.bytes += self.file.write(data)


def _safetensors_header(specs: Sequence[PieceSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"rows": json.dumps({s.name: [s.start, s.stop] for s in specs})}}
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


def collect_groups(pieces: Iterable[tuple[str, PieceSpec, Piece]]) -> Groups:
    """Entries of every tensor from (group, spec, piece) in any order; raises CheckpointError where rows are missing."""
    found: dict[str, dict[str, list[tuple[PieceSpec, Piece]]]] = {}
    for group, spec, piece in pieces:
        found.setdefault(group, {}).setdefault(spec.name, []).append((spec, piece))
    groups: dict[str, dict[str, TensorEntry]] = {}
    for group, tensors in found.items():
        groups[group] = {}
        for name, parts in tensors.items():
            parts.sort(key=lambda part: part[1].start)
            spec = parts[0][0]
            entry = TensorEntry(DTYPE_NAMES[spec.dtype], spec.shape, tuple(piece for _, piece in parts))
            check_tiling(f"{group} {name}", entry)
            groups[group][name] = entry
    return groups


def check_tiling(what: str, entry: TensorEntry) -> None:
    """Raise CheckpointError unless the pieces cover each row once."""
    row = 0
    for piece in entry.pieces:
        if piece.start != row or piece.stop <= piece.start:
            raise CheckpointError(f"{what}: expected a piece from row {row}, found [{piece.start}, {piece.stop})")
        row = piece.stop
    if row != entry.shape[0]:
        raise CheckpointError(f"{what}: pieces end at row {row} of {entry.shape[0]}")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, itself checked. Raises CheckpointError naming what is wrong with it."""
    path = directory / MANIFEST
    try:
        body = json.loads(path.read_text())
        checksum = body.pop("xxh3_128")
        version = body["format_version"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a complete checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}")
    if checksum != _checksum_of(body):
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    return _parse_manifest(body, path)


def _parse_manifest(body: Mapping[str, Any], path: Path) -> Manifest:
    try:
        files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
        groups = {
            group: {
                name: TensorEntry(e["dtype"], tuple(e["shape"]), tuple(Piece(**piece) for piece in e["pieces"]))
                for name, e in tensors.items()
            }
            for group, tensors in body["groups"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    for name in files:
        if name != Path(name).name:
            raise CheckpointError(f"{path} names a file outside its directory: {name!r}")
    for group, tensors in groups.items():
        for name, entry in tensors.items():
            if entry.dtype not in DTYPES or not all(piece.file in files for piece in entry.pieces):
                raise CheckpointError(f"{path}: {group} {name} has an unknown type or file")
            check_tiling(f"{path}: {group} {name}", entry)
    return Manifest(files, groups)


def file_checksum(path: Path) -> str:
    """The xxh3_128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _checksum_of(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
