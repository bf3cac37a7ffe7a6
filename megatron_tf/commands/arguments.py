"""The command lines: how their parsers are made, and the types of their arguments."""

import argparse
from argparse import ArgumentTypeError
from pathlib import Path

from megatron_tf.errors import UserError


def make_parser(name: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command by its name in COMMANDS."""
    return argparse.ArgumentParser(
        prog=f"megatron-tf {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


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


def read_text(path: Path) -> str:
    """The text in a file that a user named. Raises UserError where it is not UTF-8, OSError where it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start:,}: {error.reason}") from None
