"""Descriptions of the configuration keys for `--help`."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from megatron_tf.config.schema import RunConfig
from megatron_tf.help_text import Item, layout

_NAMES = {bool: "true | false", int: "int", float: "float", str: "text", Path: "path", types.NoneType: "null"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_LARGEST_SHOWN = 1_000_000  # larger bounds only reflect the integer width and would be noise in --help


def describe_keys() -> str:
    """Format every key with its type or choices, default and meaning, one section after another."""
    lines = []
    for section in dataclasses.fields(RunConfig):
        of_list = typing.get_args(section.type)
        kind: Any = of_list[0] if of_list else section.type
        prefix = "" if of_list else f"--{section.name}."
        lines.append(f"\n{section.name}: {'a list of: ' if of_list else ''}{(kind.__doc__ or '').strip()}")
        lines += layout(_items(kind, prefix))
        for name, item in _lists_of_sections(kind):
            lines.append(f"\n{section.name}.{name}: a list of: {(item.__doc__ or '').strip()}")
            lines += layout(_items(item, ""))
    return "\n".join(lines)


def _lists_of_sections(kind: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a section that are lists of sections, with the dataclass of an item."""
    for name, hint in typing.get_type_hints(kind).items():
        arguments = typing.get_args(hint)
        if typing.get_origin(hint) is list and dataclasses.is_dataclass(arguments[0]):
            yield name, arguments[0]


def _items(kind: Any, prefix: str) -> list[Item]:
    hints = typing.get_type_hints(kind, include_extras=True)
    items = []
    for name, info in kind.__pydantic_fields__.items():
        items.append(
            Item(f"{prefix}{name}", type_name(hints[name]), default=_default(info), meaning=_meaning(kind, name))
        )
    return items


def _meaning(kind: Any, name: str) -> str:
    """Return the docstring of a key, which pydantic keeps only in the class that declares the key."""
    bases = (base.__pydantic_fields__.get(name) for base in kind.__mro__ if hasattr(base, "__pydantic_fields__"))
    found = (info.description for info in bases if info is not None and info.description)
    return " ".join(next(found, "").split())


def type_name(hint: Any) -> str:
    """Format a type hint the way users write its values: choices by name, null for None, numbers with bounds."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Annotated:
        return type_name(arguments[0]) + _bounds(arguments[1:])
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin is list:
        return f"[{type_name(arguments[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(type_name(argument) for argument in arguments)}]"
    if origin is dict:
        return f"{{{type_name(arguments[0])}: {type_name(arguments[1])}}}"
    if dataclasses.is_dataclass(hint):
        return "{key: value}"
    return _NAMES[hint]


def _bounds(metadata: Sequence[Any]) -> str:
    """Format the bounds in the metadata of a number, such as " > 0"; an empty string if it has none."""
    found = []
    for entry in metadata:
        # Field(gt=0) keeps the bound in its own metadata
        for constraint in entry.metadata if isinstance(entry, FieldInfo) else [entry]:
            for attribute, sign in _BOUNDS.items():
                bound = getattr(constraint, attribute, None)
                if bound is not None and abs(bound) <= _LARGEST_SHOWN:
                    found.append(f" {sign} {bound}")
    return ",".join(found)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return f"default {value if isinstance(value, str) else json.dumps(value, default=str)}"
