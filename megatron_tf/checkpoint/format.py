"""The manifest of a checkpoint, described in docs/checkpoint_format.md. Nothing in a checkpoint is pickled.

A tensor is cut by rows only, so a piece of it is a row range, and a file holds a row range of some tensors.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_tf.checkpoint.errors import CheckpointError as CheckpointError
from megatron_tf.checkpoint.errors import DamagedCheckpointError as DamagedCheckpointError
from megatron_tf.checkpoint.errors import FormatVersionError as FormatVersionError
from megatron_tf.checkpoint.files import read_bounded

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
METADATA = "metadata.json"
LATEST = "latest"
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
}
"""The types a tensor may have in a file, by safetensors' names."""
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

# no separators, no leading dot: a manifest from a stranger can't reach out of its directory
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.safetensors")


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

_MOST_MANIFEST_BYTES = 1 << 29  # a thousand ranks write less
_MOST_BYTES = 1 << 60  # of a tensor, where its dimensions count as 1 or more: so no product of them overflows


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint consists of."""

    files: Mapping[str, FileEntry]
    groups: Groups

    def to_json(self) -> str:
        """Return the manifest as text that carries its own checksum."""
        groups = {}
        for group, tensors in self.groups.items():
            groups[group] = {name: asdict(entry) for name, entry in tensors.items()}
        body = {
            "format_version": FORMAT_VERSION,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "groups": groups,
        }
        return json.dumps(body | {"xxh3_128": _checksum_of(body)}, indent=1)


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
    """Read the manifest of a checkpoint, and check it. Raises CheckpointError naming what is wrong with it."""
    path = directory / MANIFEST
    try:
        body = json.loads(read_bounded(path, _MOST_MANIFEST_BYTES, directory))
        checksum = body.pop("xxh3_128")
        version = body["format_version"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a complete checkpoint: it has no {MANIFEST}") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatVersionError(f"{path} has format version {version!r}; this program reads {FORMAT_VERSION}")
    if checksum != _checksum_of(body, path):
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    return _parse_body(body, path)


def _parse_body(body: Mapping[str, Any], path: Path) -> Manifest:
    try:
        files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
        groups = {}
        for group, tensors in body["groups"].items():
            groups[group] = {name: _parse_entry(entry) for name, entry in tensors.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if METADATA not in files:
        raise CheckpointError(f"{path} is damaged: it does not list {METADATA}")
    for name, file in files.items():
        if name != METADATA and not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path} names {name!r}, which is no file of a checkpoint: do not use it")
        if type(file.bytes) is not int or file.bytes < 0 or not isinstance(file.xxh3_128, str):
            raise CheckpointError(f"{path}: {name} has {file.bytes!r} bytes or a checksum that cannot be")
    for group, tensors in groups.items():
        for name, entry in tensors.items():
            _check_entry(f"{path}: {group} {name}", entry, files)
    return Manifest(files, groups)


def _parse_entry(entry: Mapping[str, Any]) -> TensorEntry:
    pieces = tuple(Piece(**piece) for piece in entry["pieces"])
    return TensorEntry(entry["dtype"], tuple(entry["shape"]), pieces)


def _check_entry(what: str, entry: TensorEntry, files: Mapping[str, FileEntry]) -> None:
    numbers = list(entry.shape)
    for piece in entry.pieces:
        numbers += [piece.start, piece.stop]
    if not entry.shape or not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{what} has shape {list(entry.shape)} or rows that cannot be")
    if not isinstance(entry.dtype, str) or entry.dtype not in STORED_DTYPES:
        raise CheckpointError(f"{what} has type {entry.dtype!r}; known are {', '.join(STORED_DTYPES)}")
    if math.prod(max(1, size) for size in entry.shape) * STORED_DTYPES[entry.dtype].itemsize > _MOST_BYTES:
        raise CheckpointError(f"{what} has shape {list(entry.shape)}, which no file can hold")
    for piece in entry.pieces:
        if not isinstance(piece.file, str) or piece.file not in files:
            raise CheckpointError(f"{what} is stored in {piece.file!r}, which is not listed among the files")
    check_tiling(what, entry)


def file_checksum(path: Path) -> str:
    """Return the xxh3_128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum_of(body: Mapping[str, Any], path: Path | None = None) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    except (RecursionError, ValueError) as error:  # nested too deeply, or with characters that UTF-8 does not have
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
