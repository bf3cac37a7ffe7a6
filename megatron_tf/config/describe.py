"""The keys of a configuration, as `--help` shows them."""

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from megatron_tf.config.schema import RunConfig
from megatron_tf.help_text import Item, layout

_NAMES = {bool: "true | false", int: "int", float: "float", str: "text", Path: "path", types.NoneType: "null"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_LARGEST_SHOWN = 1_000_000  # bounds above it are of the representation: no one reaches them


def describe_keys() -> str:
    """Every key with its type or choices, its default and its meaning, section by section."""
    lines = []
    for section in dataclasses.fields(RunConfig):
        of_list = typing.get_args(section.type)
        kind: Any = of_list[0] if of_list else section.type
        prefix = "" if of_list else f"--{section.name}."
        lines.append(f"\n{section.name}: {'a list of: ' if of_list else ''}{(kind.__doc__ or '').strip()}")
        lines += layout(_items(kind, prefix))
    return "\n".join(lines)


def _items(kind: Any, prefix: str) -> list[Item]:
    hints = typing.get_type_hints(kind, include_extras=True)
    items = []
    for name, info in kind.__pydantic_fields__.items():
        meaning = " ".join((info.description or "").split())
        items.append(Item(f"{prefix}{name}", type_name(hints[name]), _default(info), meaning))
    return items


def type_name(hint: Any) -> str:
    """A type as users write its values: choices by name, null for None, and the bounds of numbers."""
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
    return _NAMES[hint]


def _bounds(metadata: Sequence[Any]) -> str:
    """The bounds among what pydantic is told of a number, such as " > 0"; empty where there are none."""
    found = []
    for entry in metadata:
        # Field(gt=0) keeps the bound among its own metadata
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
