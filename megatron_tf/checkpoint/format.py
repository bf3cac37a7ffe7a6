"""The manifest of a checkpoint, described in docs/checkpoint_format.md. Nothing in a checkpoint is pickled.

Tensors are only cut by rows: a piece is a row range of a tensor, and a file contains row ranges of some tensors.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_tf.checkpoint.errors import CheckpointError, FormatVersionError
from megatron_tf.checkpoint.files import read_bounded
from megatron_tf.checkpoint.json_object import JsonObject

PLAIN_FORMAT = 1
GROWN_FORMAT = 2
"""Format of a checkpoint whose rows belong to several generations, or whose learning rate counts from a growth;
programs that do not know these must not train it."""
FORMAT_VERSIONS = (PLAIN_FORMAT, GROWN_FORMAT)
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
"""Data types that a tensor may have in a file, by their safetensors names."""
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

# no separators, no leading dot: an untrusted manifest can't refer to files outside its directory
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.safetensors")


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a logical tensor, and the file that contains them."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorEntry:
    """A logical tensor: its type (a safetensors name), its global shape, and its pieces in row order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON values. `asdict` would copy each of a million pieces, which takes seconds."""
        return vars(self) | {"pieces": [vars(piece) for piece in self.pieces]}


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum of a file."""

    bytes: int
    xxh3_128: str


Groups = Mapping[str, Mapping[str, TensorEntry]]
"""Group ("model", "exp_avg", "exp_avg_sq") -> logical name -> entry."""

_MOST_MANIFEST_BYTES = 1 << 29  # bytes; more than a thousand ranks need
_MOST_BYTES = 1 << 60  # of a tensor, with empty dimensions counted as 1, so that no product of dimensions overflows


@dataclass(frozen=True)
class Manifest:
    """Contents of a complete checkpoint: its tensors and files."""

    files: Mapping[str, FileEntry]
    groups: Groups

    def to_json(self, version: int) -> str:
        """Return the manifest as text that carries its own checksum; `version` is that of the format."""
        groups = {}
        for group, tensors in self.groups.items():
            groups[group] = {name: entry.to_json() for name, entry in tensors.items()}
        body = {
            "format_version": version,
            "files": {name: vars(entry) for name, entry in sorted(self.files.items())},
            "groups": groups,
        }
        return json.dumps(body | {"xxh3_128": _checksum_of(body)}, indent=1)


def check_tiling(what: str, entry: TensorEntry) -> None:
    """Raise CheckpointError unless the pieces cover each row exactly once."""
    row = 0
    for piece in entry.pieces:
        if piece.start != row or piece.stop <= piece.start:
            raise CheckpointError(f"{what}: expected a piece from row {row}, found [{piece.start}, {piece.stop})")
        row = piece.stop
    if row != entry.shape[0]:
        raise CheckpointError(f"{what}: pieces end at row {row} of {entry.shape[0]}")


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest of a checkpoint. Raises CheckpointError naming the file and the problem."""
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
    if type(version) is not int or version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise FormatVersionError(f"{path} has format version {version!r}; this program supports {known}")
    if checksum != _checksum_of(body, path):
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    return _parse_body(body, path)


def _parse_body(body: Mapping[str, Any], path: Path) -> Manifest:
    """Read the fields known to this version; later versions may have added others."""
    root = JsonObject(path, "", body)
    files = _parse_files(root.section("files"), path)
    groups: dict[str, dict[str, TensorEntry]] = {}
    all_tensors = root.section("groups")
    for group in all_tensors.values:
        tensors = all_tensors.section(group)
        groups[group] = {}
        for name in tensors.values:
            entry = _parse_entry(tensors.section(name))
            _check_entry(f"{path}: {group} {name}", entry, files)
            groups[group][name] = entry
    return Manifest(files, groups)


def _parse_files(section: JsonObject, path: Path) -> dict[str, FileEntry]:
    if METADATA not in section.values:
        raise CheckpointError(f"{path} is damaged: it does not list {METADATA}")
    files = {}
    for name in section.values:
        if name != METADATA and not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path} names {name!r}, which is not a valid file name: do not use this checkpoint")
        entry = section.section(name)
        files[name] = FileEntry(entry.count("bytes"), entry.text("xxh3_128"))
    return files


def _parse_entry(entry: JsonObject) -> TensorEntry:
    pieces = []
    for piece in entry.sections("pieces"):
        pieces.append(Piece(piece.text("file"), piece.count("start"), piece.count("stop")))
    return TensorEntry(entry.text("dtype"), tuple(entry.items("shape")), tuple(pieces))


def _check_entry(what: str, entry: TensorEntry, files: Mapping[str, FileEntry]) -> None:
    if not entry.shape or not all(type(size) is int and size >= 0 for size in entry.shape):
        raise CheckpointError(f"{what} has shape {list(entry.shape)}, which is invalid")
    if entry.dtype not in STORED_DTYPES:
        raise CheckpointError(f"{what} has type {entry.dtype!r}; known are {', '.join(STORED_DTYPES)}")
    if math.prod(max(1, size) for size in entry.shape) * STORED_DTYPES[entry.dtype].itemsize > _MOST_BYTES:
        raise CheckpointError(f"{what} has shape {list(entry.shape)}, which is too large for any file")
    for piece in entry.pieces:
        if piece.file not in files:
            raise CheckpointError(f"{what} is stored in {piece.file!r}, which is missing from the list of files")
    check_tiling(what, entry)


def file_checksum(path: Path) -> str:
    """Return the xxh3_128 checksum of a file as a hexadecimal string."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum_of(body: Mapping[str, Any], path: Path | None = None) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    except (RecursionError, ValueError) as error:  # nested too deeply, or with characters that UTF-8 can't encode
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
