"""Loads a validated `RunConfig` from YAML and command-line overrides, and converts it back to plain values."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import AliasChoices, TypeAdapter, ValidationError

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.schema import RunConfig

T = TypeVar("T")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the YAML file at `path` and apply `--section.key=value` overrides in order.

    Raises ConfigError naming the file and the key for an unreadable file, an unknown key or an invalid value.
    """
    return parse_config(RunConfig, load_values(Path(path), overrides), source=str(path))


def load_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Load the same as plain values, without defaults. Raises ConfigError for a file or override that is unreadable."""
    values = read_mapping(path, expected="sections (model:, training:, ...)")
    for override in overrides:
        _apply_override(values, override)
    return values


def read_mapping(path: Path, *, expected: str) -> dict[str, Any]:
    """Read a YAML file that is a mapping, of what is `expected`.

    Raises ConfigError naming the file if it can't be read, or is not a mapping.
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
        raise ConfigError(f"{path}: expected {expected}, found {type(values).__name__}")
    return values


def parse_config(kind: type[T], values: dict[str, Any], source: str) -> T:
    """Validate `values` against the dataclass `kind`. Raises ConfigError that lists every error, one per line."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        faults = [_explain(kind, fault) for fault in _one_of_each(error.errors())]
        raise ConfigError("\n".join(f"{source}: {fault}" for fault in faults)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration to JSON values, with every default filled in."""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    section, dot, name = key.partition(".")
    if not (override.startswith("--") and equals and dot and section and name):
        raise ConfigError(f"cannot read {override!r}: overrides are written --section.key=value")
    if not text.strip():
        raise ConfigError(f"{override!r} has no value: write null for none (is a shell variable unset?)")
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise ConfigError(f"cannot apply {override!r}: {section} is not a section in the file")
    try:
        target[name] = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value of {override!r}: {_in_one_line(error)}") from error


def read_yaml(text: str) -> Any:
    """Parse YAML strictly. Raises YAMLError for anything malformed, including duplicate keys."""
    try:
        return yaml.load(text, _UniqueKeys)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _one_of_each(faults: Sequence[Any]) -> list[Any]:
    """Keep one error per value whose type is a union: the one for the alternative that the value is closest to.
    pydantic's own names of the alternatives are removed."""
    found: dict[tuple[Any, ...], Any] = {}
    for fault in faults:
        # pydantic puts the names of the types it has tried into the path of keys; the user only wrote the others
        place = tuple(part for part in fault["loc"] if not re.search(r"\[|constrained|function-", str(part)))
        # errors with such a name are alternatives of one union: report a single one for each section.key
        key = place if len(place) == len(fault["loc"]) else place[:2]
        if key not in found or len(place) > len(found[key]["loc"]):
            found[key] = fault | {"loc": place}
    return list(found.values())


class _UniqueKeys(yaml.SafeLoader):
    """Rejects duplicate keys, of which YAML silently takes the last, and names the line of an invalid value."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, TypeError, OverflowError) as error:  # a date with month 13, a number with 5,000 digits
            raise yaml.constructor.ConstructorError(None, None, f"line {node.start_mark.line + 1}: {error}") from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: a key is not a string")
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
        *path, key = fault["loc"]
        if (name := _named_otherwise(kind, path, key)) is not None:
            return f"{where} is another name of {name}, which is given too: keep one of them"
        known = _known_keys(kind, path)
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


def _known_keys(kind: Any, path: Sequence[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(_section(kind, path))]


def _named_otherwise(kind: Any, path: Sequence[Any], key: Any) -> str | None:
    """Return the key that `key` is a second name of; pydantic only finds it unexpected if both are given."""
    for name, field in _section(kind, path).__pydantic_fields__.items():
        if isinstance(field.validation_alias, AliasChoices) and key in field.validation_alias.choices:
            return str(name)
    return None


def _section(kind: Any, path: Sequence[Any]) -> Any:
    """Return the dataclass at a path of keys below `kind`."""
    for part in path:
        is_item = isinstance(part, int)
        kind = typing.get_args(kind)[0] if is_item else _field_type(kind, part)
        if isinstance(kind, types.UnionType):  # a section that may be null
            kind = next(filter(dataclasses.is_dataclass, typing.get_args(kind)))
    return kind
