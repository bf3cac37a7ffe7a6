"""Validated access to the values of an untrusted JSON file."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_tf.checkpoint.errors import CheckpointError

T = TypeVar("T")
_REQUIRED: Any = object()


class JsonObject:
    """A JSON object at `path` in the file `source`, such as "after_growth".

    Each method returns the value of a key, or the `default` if the key is absent or null. It raises CheckpointError
    naming the file and the key if a required key is missing or a value is invalid. Keys that are never read are
    ignored.
    """

    def __init__(self, source: object, path: str, values: Any) -> None:
        self.source = source
        self.path = path
        if not isinstance(values, dict):
            raise CheckpointError(f"{source}: {path} is {_kind(values)}, expected an object")
        self.values: dict[str, Any] = values

    def has(self, key: str) -> bool:
        """Return whether the key is present and not null."""
        return self.values.get(key) is not None

    def count(self, key: str, default: int = _REQUIRED, *, least: int = 0, most: int = 2**63 - 1) -> int:
        """Read an integer in [`least`, `most`]."""
        value = self._get(key, default, f"a whole number from {least} to {most}")
        return _checked_count(self._place(key), value, least=least, most=most)

    def whole(self, key: str) -> int:
        """Read an integer of any sign and size."""
        value = self._get(key, _REQUIRED, "a whole number")
        if type(value) is not int:  # bool is an int to Python
            raise CheckpointError(f"{self._place(key)} is {_shown(value)}, expected a whole number")
        return value

    def number(self, key: str, default: float = _REQUIRED, *, least: float = -math.inf) -> float:
        """Read a finite number that is `least` or more."""
        value = _checked_number(self._place(key), self._get(key, default, "a finite number"))
        if value < least:
            raise CheckpointError(f"{self._place(key)} is {_shown(value)}, expected {least} or more")
        return value

    def positive(self, key: str) -> float:
        """Read a finite number above 0."""
        value = self.number(key)
        if value <= 0:
            raise CheckpointError(f"{self._place(key)} is {_shown(value)}, expected a number above 0")
        return value

    def boolean(self, key: str, default: bool = _REQUIRED) -> bool:
        """Read a boolean."""
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._place(key)} is {_shown(value)}, expected true or false")
        return value

    def text(self, key: str) -> str:
        """Read a string."""
        value = self._get(key, _REQUIRED, "a string")
        if not isinstance(value, str):
            raise CheckpointError(f"{self._place(key)} is {_shown(value)}, expected a string")
        return value

    def items(self, key: str) -> list[Any]:
        """Read a list, whatever its items are."""
        value = self._get(key, _REQUIRED, "a list")
        if not isinstance(value, list):
            raise CheckpointError(f"{self._place(key)} is {_kind(value)}, expected a list")
        return value

    def number_items(self, key: str) -> list[float]:
        """Read a list of finite numbers."""
        return [_checked_number(f"{self._place(key)}[{i}]", item) for i, item in enumerate(self.items(key))]

    def section(self, key: str) -> "JsonObject":
        """Read an object."""
        return JsonObject(self.source, self._path(key), self._get(key, _REQUIRED, "an object"))

    def optional(self, key: str, read: Callable[["JsonObject"], T], default: T) -> T:
        """Read an object with `read`; return `default` if the key is absent or null."""
        return read(self.section(key)) if self.has(key) else default

    def sections(self, key: str) -> list["JsonObject"]:
        """Read a list of objects."""
        return [JsonObject(self.source, f"{self._path(key)}[{i}]", item) for i, item in enumerate(self.items(key))]

    def counts(self, key: str) -> dict[str, int]:
        """Read an object whose values are non-negative integers."""
        found = self.section(key).values
        return {name: _checked_count(f"{self._place(key)} of {name}", value) for name, value in found.items()}

    def numbers(self, key: str) -> dict[str, float]:
        """Read an object whose values are finite numbers."""
        found = self.section(key).values
        return {name: _checked_number(f"{self._place(key)} of {name}", value) for name, value in found.items()}

    def _get(self, key: str, default: Any, expected: str) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise CheckpointError(f"{self._place(key)} is missing, expected {expected}")
        return default

    def _path(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _place(self, key: str) -> str:
        return f"{self.source}: {self._path(key)}"


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def _checked_count(what: str, value: Any, *, least: int = 0, most: int = 2**63 - 1) -> int:
    # bool is an int to Python
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(f"{what} is {_shown(value)}, expected a whole number from {least} to {most}")
    return value


def _checked_number(what: str, value: Any) -> float:
    is_number = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    if not is_number:
        raise CheckpointError(f"{what} is {_shown(value)}, expected a finite number")
    number: float = value  # keep the type that was written: 2 does not become 2.0
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."
