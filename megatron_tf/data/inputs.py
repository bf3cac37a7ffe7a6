"""Finds input files by name or pattern: none is skipped silently, none is read twice."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_tf.data.indexed_dataset import DataError


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Expand patterns (`*`, `?`, `[...]`, and `**` for directories of any depth) into files, sorted within a pattern.

    A name with brackets that exists is that file. Raises DataError if a pattern matches nothing or something that is
    not a file, and for one file under two names; OSError for a directory that can't be read.
    """
    inputs: list[Path] = []
    for pattern in patterns:
        found = sorted(set(_matches(pattern)))
        if not found:
            raise DataError(f"--input {pattern}: no such file")
        inputs += map(Path, found)
    _check_distinct(inputs)
    return inputs


@dataclass(frozen=True)
class FileInput:
    """What inputs that are files have in common."""

    path: Path

    @property
    def name(self) -> str:
        """Name in messages."""
        return str(self.path)

    def identity(self) -> dict[str, Any]:
        """Return the file's name, size and time of modification."""
        return identity_of_file(self.path)


def identity_of_file(path: Path) -> dict[str, Any]:
    """Return a file's name, size and time of modification, which change with its contents."""
    status = path.stat()
    return {"input": str(path), "size": status.st_size, "modified": status.st_mtime_ns}


def _check_distinct(inputs: Sequence[Path]) -> None:
    names: dict[tuple[int, int], Path] = {}
    for path in inputs:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise DataError(
                f"--input {path}: it is a broken link: restore the file that it points to, or remove it"
            ) from None
        if stat.S_ISDIR(status.st_mode):
            raise DataError(f"--input {path} is a directory: name the files in it, such as '{path}/*.jsonl.zst'")
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                f"--input {path} is not a regular file: a resumed command must read its inputs again; "
                "pipe it to --input -"
            )
        file = (status.st_dev, status.st_ino)
        if file in names:
            raise DataError(f"--input names a file twice: {names[file]} and {path} are the same")
        names[file] = path


def _matches(pattern: str) -> list[str]:
    """Match a pattern component by component: the glob module silently skips directories that it can't read."""
    parts = [part for part in pattern.split("/") if part]
    found = ["/" if pattern.startswith("/") else ""]
    for depth, part in enumerate(parts, 1):
        is_last = depth == len(parts)
        bases = found
        found = []
        for base in bases:
            if part == "**":
                found += _all_below(base, with_files=is_last)
            else:
                found += [os.path.join(base, name) for name in _names(base, part)]  # noqa: PTH118
    return found


def _names(base: str, part: str) -> list[str]:
    """Return the entries of a directory that match one component of a pattern."""
    is_pattern = any(c in part for c in "*?") or ("[" in part and not os.path.lexists(os.path.join(base, part)))  # noqa: PTH118
    if not is_pattern:
        return [part] if os.path.lexists(os.path.join(base, part)) else []  # noqa: PTH118
    # as in shells, `*` does not match hidden files
    is_hidden = part.startswith(".")
    return [name for name in _entries(base) if name.startswith(".") <= is_hidden and fnmatchcase(name, part)]


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory or ".")  # noqa: PTH208
    except (NotADirectoryError, FileNotFoundError):
        return []


def _all_below(base: str, with_files: bool) -> Iterator[str]:
    """Yield a directory and those below it, each once, without hidden ones."""
    pending = [base]
    seen = set[tuple[int, int]]()  # a link may lead back to one of its parents
    while pending:
        directory = pending.pop()
        status = os.stat(directory or ".")  # noqa: PTH116
        if not stat.S_ISDIR(status.st_mode) or (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if not with_files:
            yield directory
        for name in _entries(directory):
            path = os.path.join(directory, name)  # noqa: PTH118
            if name.startswith("."):
                continue
            if os.path.isdir(path):  # noqa: PTH112
                pending.append(path)
            elif with_files:
                yield path
