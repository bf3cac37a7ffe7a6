"""Atomic commit of a checkpoint: files are written to a hidden directory, which is renamed once it is complete."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import xxhash

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.files import read_bounded
from megatron_tf.checkpoint.format import GROWN_FORMAT, LATEST, MANIFEST, METADATA, PLAIN_FORMAT, FileEntry, Manifest
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.shard_files import Written, collect_groups
from megatron_tf.checkpoint.tokenizer_file import store_tokenizer
from megatron_tf.files import replace_durably, sync_directory, write_durably

_RESERVE_BYTES = 64 << 20  # bytes to leave free in addition to what is about to be written
_STEP_NAME = re.compile(r"step_[0-9]{8,18}")
_MOST_LATEST_BYTES = 1 << 12


def step_directory(root: Path, step: int) -> Path:
    """Return the path that the checkpoint of `step` has once it is complete."""
    return root / f"step_{step:08d}"


def temporary_directory(root: Path, step: int) -> Path:
    """Return the path of the hidden directory in which the checkpoint of `step` is written."""
    return _temporary(step_directory(root, step))


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the directories of the complete checkpoints under `root`, oldest first."""
    found = [path for path in root.glob("step_*") if _STEP_NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / MANIFEST).exists()), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's directory name."""
    return int(path.name.removeprefix("step_"))


def newest_checkpoint(root: Path) -> Path:
    """Return the directory named in `latest`. Raises CheckpointError if it does not name a checkpoint."""
    latest = root / LATEST
    name = read_bounded(latest, _MOST_LATEST_BYTES).decode(errors="replace").strip()
    if not _STEP_NAME.fullmatch(name):
        raise CheckpointError(f"{latest} is damaged: it contains {name!r}: write the name of a step_* directory")
    target = root / name
    replacement = _temporary(target)
    # a process that died between the two renames of `publish` left the complete checkpoint under its temporary name
    return replacement if not target.exists() and (replacement / MANIFEST).exists() else target


def prepare_directory(root: Path, step: int, bytes_needed: int) -> Path:
    """Create an empty temporary directory for the checkpoint of `step`, and remove what killed saves left behind.

    Raises CheckpointError if the disk has less free space than `bytes_needed`.
    """
    root.mkdir(parents=True, exist_ok=True)
    _clear_litter(root)
    check_room(root, bytes_needed)
    temporary = temporary_directory(root, step)
    temporary.mkdir()
    return temporary


def check_room(directory: Path, bytes_needed: int) -> None:
    """Raise CheckpointError if the disk of `directory` has less free space than `bytes_needed`."""
    free = shutil.disk_usage(directory).free
    if free < bytes_needed + _RESERVE_BYTES:
        raise CheckpointError(
            f"{directory}: the checkpoint needs {bytes_needed:,} bytes and the disk has {free:,} free: make room"
        )


def publish(
    root: Path, step: int, *, record: RunRecord, written: Sequence[Written], source: Path | None = None
) -> Path:
    """Complete the checkpoint in the directory of `prepare_directory`, rename it into place, and point `latest` to it.

    The tokenizer's files are included; `source` is the checkpoint this one was made from, if any.
    Raises CheckpointError if rows of a tensor are missing.
    """
    temporary, target = temporary_directory(root, step), step_directory(root, step)
    metadata, manifest = metadata_and_manifest(record, written)
    store_tokenizer(record, source, temporary)
    write_durably(temporary / METADATA, metadata)
    write_durably(temporary / MANIFEST, manifest)
    sync_directory(temporary)
    old = _discarded(target)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync_directory(root)
    replace_durably(root / LATEST, target.name)
    if old.exists():
        shutil.rmtree(old)
    return target


def metadata_and_manifest(record: RunRecord, written: Sequence[Written]) -> tuple[str, str]:
    """Return the text of both files. Raises CheckpointError if rows of a tensor are missing."""
    text = json.dumps(record.to_json(), indent=1)
    entry = FileEntry(len(text.encode()), xxhash.xxh3_128_hexdigest(text.encode()))
    files = {METADATA: entry}
    for part in written:
        files |= part.files
    is_plain = record.generations is None and record.schedule_start is None
    version = PLAIN_FORMAT if is_plain else GROWN_FORMAT
    return text, Manifest(files, collect_groups(written)).to_json(version)


def abandon(root: Path, step: int) -> None:
    """Remove the directory of `prepare_directory` after an error."""
    shutil.rmtree(temporary_directory(root, step), ignore_errors=True)


def prune(root: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Remove all complete checkpoints except the newest `keep_last`, those of steps that are a multiple of `keep_every`
    and the one named in `latest`."""
    newest = newest_checkpoint(root)
    for path in complete_checkpoints(root)[:-keep_last]:
        if path != newest and (keep_every is None or step_of(path) % keep_every):
            # renamed first: a process that dies while removing leaves no damaged checkpoint behind
            path.rename(_discarded(path))
            shutil.rmtree(_discarded(path))


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _discarded(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _clear_litter(root: Path) -> None:
    for temporary in root.glob(".step_*.tmp"):
        target = temporary.with_name(temporary.name[1:].removesuffix(".tmp"))
        if (temporary / MANIFEST).exists() and not target.exists():
            temporary.rename(target)  # a complete checkpoint: only its last rename is missing
        else:
            shutil.rmtree(temporary)
    for old in root.glob(".step_*.old"):
        shutil.rmtree(old)
