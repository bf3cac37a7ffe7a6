"""From YAML and command-line overrides to a checked `RunConfig`, and back."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.schema import RunConfig

T = TypeVar("T")


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by the YAML file at `path`, with `--section.key=value` overrides applied in order.

    Raises ConfigError naming the file and the key for an unreadable file, an unknown key or a bad value.
    """
    try:
        values = read_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_in_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections (model:, training:, ...), found {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(RunConfig, values, source=str(path))


def parse_config(kind: type[T], values: dict[str, Any], source: str) -> T:
    """Check `values` against the dataclass `kind`. Raises ConfigError with every fault found, one a line."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        faults = [_explain(kind, fault) for fault in _one_of_each(error.errors())]
        raise ConfigError("\n".join(f"{source}: {fault}" for fault in faults)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values, every default spelled out."""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    section, dot, name = key.partition(".")
    if not (override.startswith("--") and equals and dot and section and name):
        raise ConfigError(f"cannot read {override!r}: overrides are written --section.key=value")
    if not text.strip():
        raise ConfigError(f"{override!r} has no value: write null for none (a shell variable that is not set?)")
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise ConfigError(f"cannot apply {override!r}: {section} is not a section in the file")
    try:
        target[name] = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value of {override!r}: {_in_one_line(error)}") from error


def read_yaml(text: str) -> Any:
    """The value that YAML describes. Raises YAMLError for whatever can't be read, duplicate keys among it."""
    try:
        return yaml.load(text, _UniqueKeys)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _one_of_each(faults: Sequence[Any]) -> list[Any]:
    """Of the types that a value could have, such as a number or a list of them, the fault in the one it is closest to;
    without the names that pydantic has for these types."""
    found: dict[tuple[Any, ...], Any] = {}
    for fault in faults:
        # pydantic puts the names of types it has tried among the keys: without them the place is what the user wrote
        place = tuple(part for part in fault["loc"] if not re.search(r"\[|constrained|function-", str(part)))
        # faults that such a name marks are alternatives: one of them is enough for a section.key
        key = place if len(place) == len(fault["loc"]) else place[:2]
        if key not in found or len(place) > len(found[key]["loc"]):
            found[key] = fault | {"loc": place}
    return list(found.values())


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with a key that is given twice, of which YAML takes the last, and names the line of a value
    that can't be built."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """See SafeLoader."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, TypeError, OverflowError) as error:  # a date of month 13, a number of 5,000 digits
            raise yaml.constructor.ConstructorError(None, None, f"line {node.start_mark.line + 1}: {error}") from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See SafeLoader."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: a key is not a name")
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice, again in line {line}")
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(kind: Any, fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        known = _known_keys(kind, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if fault["type"] in {"missing", "missing_argument"}:
        return f"missing key {where!r}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, got {fault['input']!r}"


def _field_type(kind: Any, name: Any) -> Any:
    return next(field.type for field in dataclasses.fields(kind) if field.name == name)


def _known_keys(kind: Any, path: tuple[Any, ...]) -> list[str]:
    for part in path:
        is_item = isinstance(part, int)
        kind = typing.get_args(kind)[0] if is_item else _field_type(kind, part)
    return [field.name for field in dataclasses.fields(kind)]
