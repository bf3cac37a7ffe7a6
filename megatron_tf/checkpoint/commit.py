"""Complete or absent: files are gathered in a hidden directory that is renamed once the manifest is in it."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import xxhash

from megatron_tf.checkpoint.files import read_bounded
from megatron_tf.checkpoint.format import LATEST, MANIFEST, METADATA, CheckpointError, FileEntry, Manifest
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.shard_files import Written, collect_groups
from megatron_tf.checkpoint.tokenizer_file import store_tokenizer
from megatron_tf.files import replace_durably, sync_directory, write_durably

_RESERVE_BYTES = 64 << 20  # left free in addition to what is about to be written
_STEP_NAME = re.compile(r"step_[0-9]{8,18}")
_MOST_LATEST_BYTES = 1 << 12


def step_directory(root: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`, once it is complete."""
    return root / f"step_{step:08d}"


def temporary_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is gathered."""
    return _temporary(step_directory(root, step))


def complete_checkpoints(root: Path) -> list[Path]:
    """Step directories under `root`, oldest first."""
    found = [path for path in root.glob("step_*") if _STEP_NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / MANIFEST).exists()), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def newest_checkpoint(root: Path) -> Path:
    """The directory that `latest` names. Raises CheckpointError where it names none."""
    latest = root / LATEST
    name = read_bounded(latest, _MOST_LATEST_BYTES).decode(errors="replace").strip()
    if not _STEP_NAME.fullmatch(name):
        raise CheckpointError(f"{latest} is damaged: it says {name!r}: write into it the name of a step_* directory")
    target = root / name
    replacement = _temporary(target)
    # a process that died between the two renames of `publish` left the complete one under its temporary name
    return replacement if not target.exists() and (replacement / MANIFEST).exists() else target


def prepare_directory(root: Path, step: int, bytes_needed: int) -> Path:
    """Make an empty temporary directory for the checkpoint of `step`; what killed saves left behind is cleared.

    Raises CheckpointError where the disk has less room than `bytes_needed`.
    """
    root.mkdir(parents=True, exist_ok=True)
    _clear_litter(root)
    check_room(root, bytes_needed)
    temporary = temporary_directory(root, step)
    temporary.mkdir()
    return temporary


def check_room(directory: Path, bytes_needed: int) -> None:
    """Raise CheckpointError where the disk has less room than `bytes_needed` in `directory`."""
    free = shutil.disk_usage(directory).free
    if free < bytes_needed + _RESERVE_BYTES:
        raise CheckpointError(
            f"{directory}: the checkpoint needs {bytes_needed:,} bytes and the disk has {free:,} free: make room"
        )


def publish(
    root: Path, step: int, *, record: RunRecord, written: Sequence[Written], source: Path | None = None
) -> Path:
    """Complete the checkpoint in `prepare_directory`'s directory, put it in its place, and let `latest` name it.

    `source` is the checkpoint it is made from, if it is; the tokenizer's file comes along.
    Raises CheckpointError where what was written lacks rows of a tensor.
    """
    temporary, target = temporary_directory(root, step), step_directory(root, step)
    text = json.dumps(record.to_json(), indent=1)
    entry = FileEntry(len(text.encode()), xxhash.xxh3_128_hexdigest(text.encode()))
    files = {METADATA: entry}
    for part in written:
        files |= part.files
    manifest = Manifest(files, collect_groups(written)).to_json()
    store_tokenizer(record, source, temporary)
    write_durably(temporary / METADATA, text)
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


def abandon(root: Path, step: int) -> None:
    """Remove what `prepare_directory` made, after an error."""
    shutil.rmtree(temporary_directory(root, step), ignore_errors=True)


def prune(root: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Remove complete checkpoints but the newest `keep_last`, those of every `keep_every`-th step and the one `latest`
    names."""
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
            temporary.rename(target)  # complete: only its last rename is missing
        else:
            shutil.rmtree(temporary)
    for old in root.glob(".step_*.old"):
        shutil.rmtree(old)
