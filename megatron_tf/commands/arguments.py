"""Command-line parsers: how they are created, the layout of their --help, and the types of their arguments."""

import argparse
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any, TypeVar

from megatron_tf.errors import UserError
from megatron_tf.help_text import Item, layout

T = TypeVar("T")


def make_parser(name: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """Create the parser of a command by its name in COMMANDS."""
    return _Parser(prog=f"megatron-tf {name}", description=description, epilog=epilog)


def parse(parser: argparse.ArgumentParser, kind: type[T], arguments: list[str] | None) -> T:
    """Parse arguments, by default those of the process, into the dataclass `kind`, which has a field for each one."""
    return kind(**vars(parser.parse_args(arguments)))


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose --help shows the type, choices and default of each option in columns."""

    def format_help(self) -> str:
        """Format usage, description, a block for each group of options, and the epilog."""
        blocks = [self.format_usage().rstrip(), (self.description or "").strip()]
        for group in self._action_groups:  # private to argparse, and the only list of its groups
            items = [_item(action) for action in group._group_actions if action.help is not argparse.SUPPRESS]
            if items:
                about = f": {group.description}" if group.description else ":"
                blocks.append("\n".join([f"{group.title}{about}", *layout(items)]))
        blocks.append((self.epilog or "").strip())
        return "\n\n".join(block for block in blocks if block) + "\n"


def _item(action: argparse.Action) -> Item:
    """Convert an option or a positional argument to its entry in --help."""
    name = ", ".join(action.option_strings) or action.dest
    if action.metavar and action.option_strings:
        name = f"{name} {action.metavar}"
    return Item(name, _type_of(action), default=_default_of(action), meaning=action.help or "")


def _type_of(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "flag"
    name = " | ".join(map(str, action.choices)) if action.choices else _TYPES[action.type]
    if isinstance(action, argparse._AppendAction):
        return f"{name}, repeatable"
    return {"+": f"{name} ...", "*": f"[{name} ...]"}.get(str(action.nargs), name)


def _default_of(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.nargs == 0 or action.default in (None, [], ""):
        return "optional"
    return f"default {action.default}"


def file_path(text: str) -> Path:
    """Convert an argument to a path. Raises ArgumentTypeError if it is empty, which would be the current directory."""
    return Path(file_prefix(text))


def file_prefix(text: str) -> str:
    """Check an argument that is a prefix of file names. Raises ArgumentTypeError if it is empty or contains NUL."""
    if not text.strip():
        raise ArgumentTypeError("is empty: write a path, or leave the option out (is a shell variable unset?)")
    if "\0" in text:
        raise ArgumentTypeError(f"contains a NUL character: {text!r}")
    return text


def make_folder_of(path: Path | None) -> None:
    """Create the folder of an output file, if there is one, before the work that fills it. Raises OSError."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)


def positive_int(text: str) -> int:
    """Convert an argument to a number of things. Raises ArgumentTypeError unless it is an integer above 0."""
    if not text.strip().isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"is {text}: write an integer above 0")
    return int(text)


_TYPES: dict[Any, str] = {
    None: "text",
    int: "int",
    positive_int: "int",
    float: "float",
    file_path: "path",
    file_prefix: "prefix",
}
"""Names of argument types in --help."""


def read_text(path: Path) -> str:
    """Read a text file given by the user. Raises UserError if it is not UTF-8, OSError if it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start:,}: {error.reason}") from None
