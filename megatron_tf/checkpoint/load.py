"""Reading checkpoints: any rows of any tensor, whatever layout wrote it."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.commit import complete_checkpoints, newest_checkpoint
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
from megatron_tf.checkpoint.pieces import PieceFileReader, PieceSpec
from megatron_tf.parallel.sharding import RowShard, copy_rows

BLOCK_BYTES = 4 << 20
"""Rows are streamed in blocks of about this many bytes."""


class CheckpointReader:
    """One complete checkpoint. A file's checksum is compared before anything is read from it.

    `path` is the checkpoint's own directory, or the directory of a run, whose newest one is meant. Raises
    CheckpointError for one that is missing, incomplete or damaged, naming the file, and the newest sound one.
    """

    def __init__(self, path: Path) -> None:
        self.directory = _resolve(path)
        self._is_newest = self.directory != path
        self._open_files: dict[str, PieceFileReader] = {}
        with self._offering_another():
            self.manifest = read_manifest(self.directory)
            self._check_files()
            self.metadata: dict[str, Any] = self._read_metadata()

    @property
    def step(self) -> int:
        """Optimizer steps behind the checkpoint."""
        return int(self.metadata["training"]["step"])

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return list(self.manifest.groups)

    def has_group(self, group: str) -> bool:
        """Whether there are tensors of this group, such as an optimizer moment."""
        return group in self.manifest.groups

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
        """Rows [start, stop) of a tensor, on the CPU; only those are read. Raises CheckpointError if it has fewer."""
        entry = self._entry(group, name)
        if not 0 <= start <= stop <= entry.shape[0]:
            raise CheckpointError(
                f"{self.directory}: {name} has {entry.shape[0]} rows, [{start}, {stop}) are asked for"
            )
        rows = torch.empty((stop - start, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
        for piece in entry.pieces:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                spec = PieceSpec(name, rows.dtype, entry.shape, piece.start, piece.stop)
                self._open(piece.file).read(spec, low, rows[low - start : high - start])
        return rows

    def read_blocks(self, group: str, name: str, start: int, stop: int) -> Iterator[Tensor]:
        """Rows [start, stop) in blocks of bounded size."""
        step = rows_per_block(self.shape(group, name), self.dtype(group, name))
        for low in range(start, stop, step):
            yield self.read_rows(group, name, low, min(stop, low + step))

    def verify(self) -> None:
        """Read everything and compare checksums. Raises CheckpointError naming the first file that differs."""
        with self._offering_another():
            for name in self.manifest.files:
                self._check_checksum(name)

    def _entry(self, group: str, name: str) -> TensorEntry:
        try:
            return self.manifest.groups[group][name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name!r} in {group!r}") from None

    def _open(self, file: str) -> PieceFileReader:
        if file not in self._open_files:
            with self._offering_another():
                self._check_checksum(file)
                self._open_files[file] = PieceFileReader(self.directory / file)
        return self._open_files[file]

    def _check_files(self) -> None:
        present = {path.name for path in self.directory.iterdir() if not path.name.startswith(".")}
        for name, entry in self.manifest.files.items():
            path = self.directory / name
            if name not in present:
                raise CheckpointError(f"{path} is missing")
            if (size := path.stat().st_size) != entry.bytes:
                raise CheckpointError(f"{path} is damaged: {size} bytes instead of {entry.bytes}")
        if strangers := present - self.manifest.files.keys() - {MANIFEST}:
            path = self.directory / min(strangers)
            raise CheckpointError(f"{path} does not belong to the checkpoint: remove it")

    def _check_checksum(self, name: str) -> None:
        if file_checksum(self.directory / name) != self.manifest.files[name].xxh3_128:
            raise CheckpointError(f"{self.directory / name} is damaged: its checksum does not match")

    def _read_metadata(self) -> dict[str, Any]:
        self._check_checksum(METADATA)
        path = self.directory / METADATA
        try:
            metadata: dict[str, Any] = json.loads(path.read_bytes())
            int(metadata["training"]["step"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} does not say training.step: {error!r}") from error
        return metadata

    @contextmanager
    def _offering_another(self) -> Iterator[None]:
        """Errors found within also name the newest sound checkpoint, if the one to read was not the user's choice."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._another() if self._is_newest else ''}") from error

    def _another(self) -> str:
        for candidate in reversed(complete_checkpoints(self.directory.parent)):
            if candidate != self.directory:
                try:
                    CheckpointReader(candidate).verify()
                except CheckpointError:
                    continue
                return (
                    f"; the newest sound checkpoint is {candidate}: to go on from it, write {candidate.name} into "
                    f"{candidate.parent / LATEST}"
                )
        return "; there is no other sound checkpoint beside it"


def rows_per_block(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Rows of a tensor that make a block of BLOCK_BYTES, at least one."""
    return max(1, BLOCK_BYTES // max(1, torch.Size(shape[1:]).numel() * dtype.itemsize))


def load_shards(
    reader: CheckpointReader, group: str, shards: Sequence[RowShard], expected_names: Collection[str]
) -> None:
    """Copy this rank's rows in place, bit for bit. `expected_names` are all tensors of the model.

    Raises CheckpointError where names, shapes or types are not those of the checkpoint.
    """
    _check_names(reader, group, expected_names)
    for shard in shards:
        shape, dtype = reader.shape(group, shard.name), reader.dtype(group, shard.name)
        if shape != shard.global_shape or dtype != shard.tensor.dtype:
            raise CheckpointError(
                f"{reader.directory} is a checkpoint of another model: {group} {shard.name} is {list(shape)} "
                f"{dtype} in it, {list(shard.global_shape)} {shard.tensor.dtype} in the configured model: change "
                f"the configuration, or grow the checkpoint"
            )
        copy_rows(shard, reader.read_rows(group, shard.name, shard.start, shard.stop))


def _check_names(reader: CheckpointReader, group: str, expected: Collection[str]) -> None:
    if not reader.has_group(group):
        raise CheckpointError(f"{reader.directory} holds no {group!r}, only {', '.join(reader.groups())}")
    saved = set(reader.names(group))
    for names, verb in ((set(expected) - saved, "lacks"), (saved - set(expected), "also has")):
        if names:
            raise CheckpointError(
                f"{reader.directory} is a checkpoint of another model: its {group!r} {verb} {min(names)}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            )


def _resolve(path: Path) -> Path:
    if (path / LATEST).exists():
        return newest_checkpoint(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: there is no checkpoint to read")
    if not (path / MANIFEST).exists() and not path.name.startswith("step_"):
        complete = complete_checkpoints(path)
        hint = f"; name one of its checkpoints, such as {complete[-1]}" if complete else ""
        raise CheckpointError(f"{path} holds no checkpoint: neither {LATEST!r} nor {MANIFEST!r} is in it{hint}")
    return path
