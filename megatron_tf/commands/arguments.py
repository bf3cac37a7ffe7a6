"""The command lines: how their parsers are made, what their --help looks like, and the types of their arguments."""

import argparse
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any, TypeVar

from megatron_tf.errors import UserError
from megatron_tf.help_text import Item, layout

T = TypeVar("T")


def make_parser(name: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command by its name in COMMANDS."""
    return _Parser(prog=f"megatron-tf {name}", description=description, epilog=epilog)


def parse(parser: argparse.ArgumentParser, kind: type[T], arguments: list[str] | None) -> T:
    """The arguments, by default those of the process, as the dataclass `kind`, which has a field for each of them."""
    return kind(**vars(parser.parse_args(arguments)))


class _Parser(argparse.ArgumentParser):
    """Shows the type, choices and default of each option in columns, which argparse leaves to each `help`."""

    def format_help(self) -> str:
        """Usage, description, a block for each group of options, epilog."""
        blocks = [self.format_usage().rstrip(), (self.description or "").strip()]
        for group in self._action_groups:  # private to argparse, and the only list of its groups
            items = [_item(action) for action in group._group_actions if action.help is not argparse.SUPPRESS]
            if items:
                about = f": {group.description}" if group.description else ":"
                blocks.append("\n".join([f"{group.title}{about}", *layout(items)]))
        blocks.append((self.epilog or "").strip())
        return "\n\n".join(block for block in blocks if block) + "\n"


def _item(action: argparse.Action) -> Item:
    """What --help shows of an option or a positional argument."""
    name = ", ".join(action.option_strings) or action.dest
    if action.metavar and action.option_strings:
        name = f"{name} {action.metavar}"
    return Item(name, _type_of(action), _default_of(action), action.help or "")


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
    value = " ".join(action.default) if isinstance(action.default, list) else action.default
    return f"default {value}"


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


_TYPES: dict[Any, str] = {None: "text", int: "int", float: "float", file_path: "path", file_prefix: "prefix"}
"""Types of arguments as users know them."""


def read_text(path: Path) -> str:
    """The text in a file that a user named. Raises UserError where it is not UTF-8, OSError where it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start:,}: {error.reason}") from None
