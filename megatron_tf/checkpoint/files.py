"""Safe access to files of untrusted checkpoints: only regular files of bounded size are opened."""

import stat
from pathlib import Path

from megatron_tf.checkpoint.errors import CheckpointError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def file_size(path: Path, inside: Path | None = None) -> int:
    """Return the size of a regular file without opening it, since opening a FIFO would block.

    Raises CheckpointError for anything that is not a regular file, and for a link out of the directory `inside`;
    FileNotFoundError if it does not exist.
    """
    if path.is_symlink():
        if not path.exists():
            raise CheckpointError(f"{path} is a link to a file that does not exist")
        if inside is not None and not path.resolve().is_relative_to(inside.resolve()):
            raise CheckpointError(f"{path} is a link out of its directory: replace it with a copy of the file")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not one")
        raise CheckpointError(f"{path} must be a regular file: it is {kind}")
    return status.st_size


def read_bounded(path: Path, most_bytes: int, inside: Path | None = None) -> bytes:
    """Read a regular file. Raises CheckpointError if it has more than `most_bytes`, and as `file_size` does."""
    size = file_size(path, inside)
    if size > most_bytes:
        raise CheckpointError(f"{path} has {size:,} bytes, more than the {most_bytes:,} that such a file can have")
    return path.read_bytes()
