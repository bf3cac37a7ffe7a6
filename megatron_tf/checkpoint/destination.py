"""Checks of output directories: not inside a checkpoint, and not among the checkpoints of another run."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tf.checkpoint.commit import check_room, complete_checkpoints, step_directory
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.format import LATEST, MANIFEST
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.files import sync_directory, sync_tree


def check_outside_checkpoints(path: Path, option: str) -> None:
    """Raise CheckpointError if `path`, the value of `option`, is a checkpoint's directory or inside one: writing there
    would make that checkpoint unreadable."""
    place = path.resolve()
    for directory in (place, *place.parents):
        if (directory / MANIFEST).exists():
            raise CheckpointError(f"{option} {path} is inside the checkpoint {directory}: choose another directory")


@contextmanager
def new_directory(save: Path, bytes_needed: int) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `save` at the end, or removed after an error.

    Raises CheckpointError if `save` exists or is inside a checkpoint, or if the disk is too small.
    """
    check_outside_checkpoints(save, "--save")
    if save.exists() and not (save.is_dir() and not any(save.iterdir())):
        raise CheckpointError(f"{save} already exists: choose another --save, or remove it")
    workplace = save.with_name(f".{save.name}.tmp")
    shutil.rmtree(workplace, ignore_errors=True)
    directory = workplace / save.name
    directory.mkdir(parents=True)
    try:
        check_room(directory, bytes_needed)
        yield directory
        sync_tree(directory)
        directory.replace(save)
        sync_directory(save.parent)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def check_destination(checkpoint: Checkpoint, root: Path, step: int) -> None:
    """Raise CheckpointError if `root` contains other checkpoints that the one of `step` would replace or join.

    A checkpoint with the same values, written by an earlier call, may be replaced.
    """
    target, found = step_directory(root, step), complete_checkpoints(root)
    others = [path for path in found if path != target]
    advice = "choose another --save, or allow it with reshard-checkpoint --allow-existing"
    if others:
        raise CheckpointError(f"{root} already contains checkpoints, such as {others[-1].name}: {advice}")
    if target in found and not _is_same(checkpoint, target):
        raise CheckpointError(f"{target} is another checkpoint that would be replaced: {advice}")
    if not found and (root / LATEST).exists():
        raise CheckpointError(f"{root / LATEST} exists, as in the directory of a run: {advice}")


def _is_same(checkpoint: Checkpoint, directory: Path) -> bool:
    """Return whether the checkpoint in `directory` has the same values; False for a damaged one."""
    try:
        existing = CheckpointReader(directory)
        if existing.record != checkpoint.record:
            return False
        return next(differences(checkpoint, existing), None) is None
    except CheckpointError:
        return False
