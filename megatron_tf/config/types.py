"""Types that the sections of a configuration share."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _no_boolean(value: Any) -> Any:
    """Python takes true for 1."""
    if isinstance(value, bool):
        raise ValueError(f"should be a number, got {str(value).lower()}")  # noqa: TRY004  # pydantic reports ValueError
    return value


def _not_empty(value: Any) -> Any:
    """An empty path would be the current directory."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty: write a path, or null for none")
    return value


Count = Annotated[int, Field(gt=0), BeforeValidator(_no_boolean)]
NonNegative = Annotated[int, Field(ge=0), BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean)]
FilePath = Annotated[Path, BeforeValidator(_not_empty)]

ParameterKind = Literal["embedding", "qkv", "proj", "ffn", "final_norm", "head"]
