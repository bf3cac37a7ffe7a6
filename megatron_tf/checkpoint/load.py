"""Reading checkpoints: any rows of any tensor, whatever layout wrote it."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tf.checkpoint.commit import complete_checkpoints
from megatron_tf.checkpoint.format import (
    DTYPES,
    LATEST,
    MANIFEST,
    METADATA,
    CheckpointError,
    TensorEntry,
    file_checksum,
    read_manifest,
)
from megatron_tf.parallel.sharding import RowShard, copy_rows


class CheckpointReader:
    """One complete checkpoint. A file's checksum is compared before anything is read from it.

    `path` is the checkpoint's own directory, or the directory of a run, whose newest one is meant. Raises
    CheckpointError for one that is missing, incomplete or damaged, naming the file, and the newest sound one.
    """

    def __init__(self, path: Path) -> None:
        self.directory = _resolve(path)
        try:
            self.manifest = read_manifest(self.directory)
            self._check_files()
            self.metadata: dict[str, Any] = self._read_metadata()
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_suggest_another(path, self.directory)}") from error
        self._open_files: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """Optimizer steps behind the checkpoint."""
        return int(self.metadata["training"]["step"])

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return list(self.manifest.groups)

    def names(self, group: str) -> list[str]:
        """Logical tensors of a group."""
        return list(self.manifest.groups.get(group, {}))

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Global shape."""
        return self._entry(group, name).shape

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Type."""
        return DTYPES[self._entry(group, name).dtype]

    def read_rows(self, group: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, on the CPU; only those are read."""
        entry = self._entry(group, name)
        parts = []
        for piece in entry.pieces:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                parts.append(self._slice(piece.file, name, low - piece.start, high - piece.start))
        if not parts:
            return torch.empty((0, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def verify(self) -> None:
        """Read everything and compare checksums. Raises CheckpointError naming the first file that differs."""
        for name in self.manifest.files:
            self._check_checksum(name)

    def _entry(self, group: str, name: str) -> TensorEntry:
        try:
            return self.manifest.groups[group][name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name!r} in {group!r}") from None

    def _slice(self, file: str, name: str, start: int, stop: int) -> Tensor:
        if file not in self._open_files:
            self._check_checksum(file)
            try:
                self._open_files[file] = safe_open(self.directory / file, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{self.directory / file} is damaged: {error}") from error
        rows: Tensor = self._open_files[file].get_slice(name)[start:stop]
        return rows

    def _check_files(self) -> None:
        present = {path.name for path in self.directory.iterdir()} - {MANIFEST}
        for name, entry in self.manifest.files.items():
            path = self.directory / name
            if name not in present:
                raise CheckpointError(f"{path} is missing")
            if path.stat().st_size != entry.bytes:
                raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes instead of {entry.bytes}")
        if strangers := present - self.manifest.files.keys():
            raise CheckpointError(f"{self.directory / min(strangers)} does not belong to the checkpoint: remove it")

    def _check_checksum(self, name: str) -> None:
        if file_checksum(self.directory / name) != self.manifest.files[name].xxh3_128:
            raise CheckpointError(f"{self.directory / name} is damaged: its checksum does not match")

    def _read_metadata(self) -> dict[str, Any]:
        self._check_checksum(METADATA)
        metadata: dict[str, Any] = json.loads((self.directory / METADATA).read_text())
        return metadata


def load_shards(
    reader: CheckpointReader, group: str, shards: Sequence[RowShard], expected_names: Collection[str]
) -> None:
    """Copy this rank's rows in place, bit for bit. `expected_names` are all tensors of the model.

    Raises CheckpointError where names, shapes or types are not those of the checkpoint.
    """
    saved = set(reader.names(group))
    if missing := set(expected_names) - saved:
        raise CheckpointError(f"{reader.directory}: {group} lacks {min(missing)}: it is a checkpoint of another model")
    if extra := saved - set(expected_names):
        raise CheckpointError(f"{reader.directory}: {group} also has {min(extra)}: it is a checkpoint of another model")
    for shard in shards:
        shape, dtype = reader.shape(group, shard.name), reader.dtype(group, shard.name)
        if shape != shard.global_shape or dtype != shard.tensor.dtype:
            raise CheckpointError(
                f"{reader.directory}: {group} {shard.name} is {list(shape)} {dtype} in the checkpoint, "
                f"{list(shard.global_shape)} {shard.tensor.dtype} in the configured model"
            )
        copy_rows(shard, reader.read_rows(group, shard.name, shard.start, shard.stop))


def _resolve(path: Path) -> Path:
    latest = path / LATEST
    if latest.exists():
        return path / latest.read_text().strip()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: there is no checkpoint to read")
    if not (path / MANIFEST).exists() and not path.name.startswith("step_"):
        raise CheckpointError(f"{path} holds no checkpoint: neither {LATEST!r} nor {MANIFEST!r} is in it")
    return path


def _suggest_another(asked: Path, failed: Path) -> str:
    """A hint at the newest sound checkpoint beside the one that failed."""
    for candidate in reversed(complete_checkpoints(failed.parent)):
        if candidate != failed and asked != failed:
            try:
                CheckpointReader(candidate).verify()
            except CheckpointError:
                continue
            return f"; the newest sound checkpoint is {candidate}: write its name into {LATEST} to use it"
    return ""
