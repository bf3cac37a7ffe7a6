"""Types that the sections of a configuration share."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]

ParameterKind = Literal["embedding", "qkv", "proj", "ffn", "final_norm", "head"]
