"""Complete or absent: files are gathered in a hidden directory that is renamed once the manifest is in it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_tf.checkpoint.format import LATEST, MANIFEST, METADATA, CheckpointError, FileEntry, Groups, Manifest

_RESERVE_BYTES = 64 << 20  # left free beside what is about to be written


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies once it is complete."""
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Step directories under `root`, oldest first."""
    return sorted(path for path in root.glob("step_*") if (path / MANIFEST).exists())


def prepare(root: Path, step: int, bytes_needed: int) -> Path:
    """A fresh temporary directory for the checkpoint of `step`; what killed saves left behind is cleared.

    Raises CheckpointError where the disk has less room than `bytes_needed`.
    """
    root.mkdir(parents=True, exist_ok=True)
    for litter in root.glob(".step_*.tmp"):
        shutil.rmtree(litter)
    free = shutil.disk_usage(root).free
    if free < bytes_needed + _RESERVE_BYTES:
        raise CheckpointError(
            f"{root}: the checkpoint needs {bytes_needed:,} bytes and the disk has {free:,} free: make room"
        )
    temporary = temporary_directory(root, step)
    temporary.mkdir()
    return temporary


def temporary_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is gathered."""
    return root / f".step_{step:08d}.tmp"


def publish(root: Path, step: int, metadata: Mapping[str, Any], files: Mapping[str, FileEntry], groups: Groups) -> Path:
    """Complete the checkpoint in `prepare`'s directory, put it in its place, and let `latest` name it."""
    temporary, target = temporary_directory(root, step), step_directory(root, step)
    text = json.dumps(metadata, indent=1)
    _write_durably(temporary / METADATA, text)
    entry = FileEntry(len(text.encode()), xxhash.xxh3_128_hexdigest(text.encode()))
    _write_durably(temporary / MANIFEST, Manifest({**files, METADATA: entry}, groups).to_json())
    _sync_directory(temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    new_latest = root / f".{LATEST}.tmp"
    _write_durably(new_latest, target.name)
    new_latest.replace(root / LATEST)
    _sync_directory(root)
    return target


def prune(root: Path, keep_last: int) -> None:
    """Remove complete checkpoints but the newest `keep_last`."""
    for path in complete_checkpoints(root)[:-keep_last]:
        shutil.rmtree(path)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
