"""Reads checkpoints from files: any rows of any tensor, whatever layout wrote them."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatron_tf.checkpoint.commit import complete_checkpoints, newest_checkpoint
from megatron_tf.checkpoint.contents import check_complete, names_difference
from megatron_tf.checkpoint.errors import CheckpointError, DamagedCheckpointError, FormatVersionError
from megatron_tf.checkpoint.files import file_size, read_bounded
from megatron_tf.checkpoint.format import (
    LATEST,
    MANIFEST,
    METADATA,
    STORED_DTYPES,
    Manifest,
    TensorEntry,
    file_checksum,
    read_manifest,
)
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.shard_files import HashedFile, PieceSpec, ShardFileReader
from megatron_tf.parallel.sharding import RowShard, copy_rows

_MOST_METADATA_BYTES = 1 << 26


class CheckpointReader:
    """Reads one complete checkpoint, verifying the checksum of each file before using it.

    `path` is a checkpoint directory, or the directory of a run, which means its newest checkpoint. With `check_at_end`
    checksums are computed while reading, which saves a pass over a large checkpoint that is read completely once; call
    `verify` before relying on what was read. Raises CheckpointError for a checkpoint that is missing, incomplete or
    damaged, naming the file and, if there is one, the newest intact checkpoint.
    """

    def __init__(self, path: Path, check_at_end: bool = False) -> None:
        self.directory = _resolve(path)
        self._check_at_end = check_at_end
        self._is_newest = self.directory != path
        self._open_files: dict[str, ShardFileReader] = {}
        self._hashed_files: dict[str, HashedFile] = {}
        with self._offering_another():
            self.manifest = read_manifest(self.directory)
            self._check_files()
            self.record = self._read_record()

    def complete(self) -> "CheckpointReader":
        """Return self. Raises CheckpointError unless the checkpoint contains the complete model of its record."""
        with self._offering_another():
            check_complete(self)
        return self

    @property
    def step(self) -> int:
        """Number of optimizer steps at which the checkpoint was saved."""
        return self.record.training.step

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return list(self.manifest.groups)

    def names(self, group: str) -> list[str]:
        """Names of the logical tensors of a group."""
        return list(self.manifest.groups.get(group, {}))

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return self._entry(group, name).shape

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return STORED_DTYPES[self._entry(group, name).dtype]

    def read_rows(self, group: str, name: str, *, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor to the CPU, and nothing else. Raises CheckpointError if it has fewer."""
        entry = self._entry(group, name)
        if not 0 <= start <= stop <= entry.shape[0]:
            raise CheckpointError(
                f"{self.directory}: {name} has {entry.shape[0]} rows, [{start}, {stop}) are requested"
            )
        dtype = STORED_DTYPES[entry.dtype]
        parts = []
        for piece in entry.pieces:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                spec = PieceSpec(name, dtype, entry.shape, start=piece.start, stop=piece.stop)
                file = self._open(piece.file)
                file.check(spec)  # before allocating memory for rows that the file may not have
                parts.append((file, spec, low, high))
        rows = torch.empty((stop - start, *entry.shape[1:]), dtype=dtype)
        for file, spec, low, high in parts:
            file.read(spec, low, rows[low - start : high - start])
        return rows

    def verify(self) -> None:
        """Verify the checksums of all files, reading what has not been read yet. Raises CheckpointError naming the
        first file that differs."""
        with self._offering_another():
            for name in self.manifest.files:
                hashed = self._hashed_files.pop(name, None)
                self._open_files.pop(name, None)
                self._compare(name, hashed.finish() if hashed else file_checksum(self.directory / name))

    def close(self) -> None:
        """Free the memory of the manifest and of file headers; nothing can be read afterwards."""
        self.manifest = Manifest({}, {})
        self._open_files.clear()
        self._hashed_files.clear()

    def _entry(self, group: str, name: str) -> TensorEntry:
        try:
            return self.manifest.groups[group][name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name!r} in {group!r}") from None

    def _open(self, file: str) -> ShardFileReader:
        if file not in self._open_files:
            with self._offering_another():
                path = self.directory / file
                if not self._check_at_end:
                    self._compare(file, file_checksum(path))
                else:
                    self._hashed_files[file] = HashedFile(path)
                self._open_files[file] = ShardFileReader(path, self._hashed_files.get(file))
        return self._open_files[file]

    def _check_files(self) -> None:
        present = {path.name for path in self.directory.iterdir() if not path.name.startswith(".")}
        for name, entry in self.manifest.files.items():
            path = self.directory / name
            if name not in present:
                raise CheckpointError(f"{path} is missing")
            if (size := file_size(path, self.directory)) != entry.bytes:
                raise CheckpointError(f"{path} is damaged: {size} bytes instead of {entry.bytes}")
        if strangers := present - self.manifest.files.keys() - {MANIFEST}:
            path = self.directory / min(strangers)
            raise CheckpointError(f"{path} does not belong to the checkpoint: remove it")

    def _compare(self, name: str, checksum: str) -> None:
        if checksum != self.manifest.files[name].xxh3_128:
            raise CheckpointError(f"{self.directory / name} is damaged: its checksum does not match")

    def _read_record(self) -> RunRecord:
        path = self.directory / METADATA
        text = read_bounded(path, _MOST_METADATA_BYTES, self.directory)
        self._compare(METADATA, xxhash.xxh3_128_hexdigest(text))
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} does not say training.step: {error!r}") from error
        return RunRecord.from_json(values, path)

    @contextmanager
    def _offering_another(self) -> Iterator[None]:
        """Add the newest intact checkpoint to errors raised within, unless the user chose which checkpoint to read."""
        try:
            yield
        except FormatVersionError:
            raise
        except CheckpointError as error:
            raise DamagedCheckpointError(f"{error}{self._another() if self._is_newest else ''}") from error

    def _another(self) -> str:
        for candidate in reversed(complete_checkpoints(self.directory.parent)):
            if candidate != self.directory:
                try:
                    CheckpointReader(candidate).verify()
                except (CheckpointError, OSError):
                    continue
                return (
                    f"; the newest intact checkpoint is {candidate}: to resume from it, write {candidate.name} into "
                    f"{candidate.parent / LATEST}"
                )
        return "; there is no other intact checkpoint next to it"


def load_shards(
    checkpoint: Checkpoint, group: str, shards: Sequence[RowShard], *, expected_names: Collection[str]
) -> None:
    """Copy this rank's rows into its shards in place. `expected_names` are all tensors of the model.

    Every bit is kept, except that fp32 rows are widened to fp64 shards, exactly, and fp64 rows are rounded to fp32
    shards. Raises CheckpointError if names, shapes or other types differ from those of the checkpoint.
    """
    _check_names(checkpoint, group, expected_names)
    for shard in shards:
        shape, dtype = checkpoint.shape(group, shard.name), checkpoint.dtype(group, shard.name)
        if shape != shard.global_shape or not _can_load(dtype, shard.tensor.dtype):
            raise CheckpointError(
                f"{checkpoint.directory} is a checkpoint of another model: {group} {shard.name} is {list(shape)} "
                f"{dtype} in it, {list(shard.global_shape)} {shard.tensor.dtype} in the configured model: change "
                f"the configuration, or grow the checkpoint"
            )
        copy_rows(shard, checkpoint.read_rows(group, shard.name, start=shard.start, stop=shard.stop))


def _can_load(stored: torch.dtype, wanted: torch.dtype) -> bool:
    return stored == wanted or {stored, wanted} == {torch.float32, torch.float64}


def _check_names(checkpoint: Checkpoint, group: str, expected: Collection[str]) -> None:
    if group not in checkpoint.groups():
        raise CheckpointError(f"{checkpoint.directory} holds no {group!r}, only {', '.join(checkpoint.groups())}")
    if difference := names_difference(checkpoint, group, expected):
        raise CheckpointError(f"{checkpoint.directory} is a checkpoint of another model: its {group!r} {difference}")


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
