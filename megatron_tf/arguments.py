"""Types of arguments on command lines."""

from argparse import ArgumentTypeError
from pathlib import Path


def file_path(text: str) -> Path:
    """A path that is not empty, which would be the current directory. Raises ArgumentTypeError."""
    return Path(file_prefix(text))


def file_prefix(text: str) -> str:
    """What names of files start with; not empty. Raises ArgumentTypeError."""
    if not text.strip():
        raise ArgumentTypeError("is empty: write a path, or leave the option out (a shell variable that is not set?)")
    if "\0" in text:
        raise ArgumentTypeError(f"holds a NUL character: {text!r}")
    return text
