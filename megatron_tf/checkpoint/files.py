"""Files of a checkpoint that anyone may have made: what is opened is a regular file of bounded size."""

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
    """The size of a regular file, found without opening it: to open a FIFO would wait for its other end.

    Raises CheckpointError for anything that is not a regular file, and for a link out of the directory `inside`;
    FileNotFoundError where there is nothing.
    """
    if path.is_symlink():
        if not path.exists():
            raise CheckpointError(f"{path} is a link to a file that does not exist")
        if inside is not None and not path.resolve().is_relative_to(inside.resolve()):
            raise CheckpointError(f"{path} is a link out of its directory: copy the file itself there")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not one")
        raise CheckpointError(f"{path} must be a regular file: it is {kind}")
    return status.st_size


def read_bounded(path: Path, most_bytes: int, inside: Path | None = None) -> bytes:
    """The bytes of a regular file. Raises CheckpointError for a file of more than `most_bytes`, and as `file_size`."""
    size = file_size(path, inside)
    if size > most_bytes:
        raise CheckpointError(f"{path} has {size:,} bytes, more than the {most_bytes:,} that such a file can have")
    return path.read_bytes()
