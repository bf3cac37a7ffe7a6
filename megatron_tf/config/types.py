"""Validated value types shared by the sections of a configuration."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from megatron_tf.config.errors import ConfigError

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _no_boolean(value: Any) -> Any:
    """Reject booleans, which are integers to Python."""
    if isinstance(value, bool):
        raise ConfigError(f"should be a number, got {str(value).lower()}")
    return value


def _not_empty(value: Any) -> Any:
    """Reject empty paths, which would mean the current directory."""
    if isinstance(value, str) and not value.strip():
        raise ConfigError("is empty: write a path, or null for none")
    return _no_nul(value)


def _no_nul(value: Any) -> Any:
    """Reject NUL characters here, where the error can name the key: open() would only say ValueError."""
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"contains a NUL character, got {value!r}")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ConfigError("is empty: write a name, or null for none")
    return value


# integers are stored in 64 bits; sizes of a model are bounded further because several are multiplied
Count = Annotated[int, Field(gt=0, lt=2**63), BeforeValidator(_no_boolean)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_no_boolean)]
Seed = Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(_no_boolean)]
Size = Annotated[int, Field(gt=0, lt=2**31), BeforeValidator(_no_boolean)]
NumLayers = Annotated[Size, Field(le=100_000)]
Number = Annotated[float, BeforeValidator(_no_boolean)]
FilePath = Annotated[Path, BeforeValidator(_not_empty)]
Prefix = Annotated[str, AfterValidator(_no_nul)]
Name = Annotated[str, AfterValidator(_not_blank)]

ParameterKind = Literal["embedding", "qkv", "proj", "ffn", "norm", "final_norm", "head"]
