"""Growth by zero keys: appending parameter tokens to a checkpoint without changing what its model computes.

A key of zeros scores zero on every input: under both L2 normalisations it adds nothing to the row's norm, and its
weight gelu(0) is zero, so the output stays as it is provided that tau is kept. The new values are drawn as at birth:
they give the new keys a gradient at the first step.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.parallel.random import normal_rows

KINDS = ("qkv", "proj", "ffn")
_TOKENS = re.compile(r"layers\.\d+\.(?:attention\.(query|key|value|proj)|(ffn))\.(key|value)_tokens")


@dataclass(frozen=True)
class GrowthPlan:
    """New numbers of tokens by kind, and how the new rows are filled. Raises CheckpointError for a dead growth."""

    tokens: Mapping[str, tuple[int, int]]
    """Kind -> (old, new) number of tokens."""
    value_std: float
    """Standard deviation of the new value tokens."""
    seed: int
    """Decides the new values, together with the tensor's name and the row."""
    init: str = "zero_key"

    def __post_init__(self) -> None:
        if self.value_std == 0:
            raise CheckpointError(
                "growth with new keys and new values both zero is dead: neither ever receives a gradient; "
                "give the values a standard deviation above zero"
            )

    def rows(self, name: str, old: int) -> int:
        """Rows of the tensor `name` after growth. Raises CheckpointError where `old` is not what the plan expects."""
        kind = token_kind(name)
        if kind is None or kind not in self.tokens:
            return old
        expected, new = self.tokens[kind]
        if old != expected:
            raise CheckpointError(f"{name} has {old} rows, the checkpoint's metadata says {kind}_tokens = {expected}")
        return new

    def new_rows(self, group: str, name: str, start: int, stop: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of what is appended: drawn for value tokens, zero for keys and for Adam's moments."""
        if group == "model" and name.endswith("value_tokens"):
            return normal_rows(name, self.seed, start, stop, columns, self.value_std).to(dtype)
        return torch.zeros(stop - start, columns, dtype=dtype)

    def grown_metadata(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of the grown checkpoint: new counts, one more entry of lineage, tau as it was."""
        counts = {f"{kind}_tokens": new for kind, (_, new) in self.tokens.items()}
        entry = {
            **{key: metadata["training"][key] for key in ("step", "samples", "tokens")},
            "kinds": {kind: list(change) for kind, change in self.tokens.items()},
            "init": self.init,
            "seed": self.seed,
        }
        config = {**metadata["config"], "model": {**metadata["config"]["model"], **counts}}
        return {
            **metadata,
            "model": {**metadata["model"], **counts},
            "config": config,
            "lineage": [*metadata["lineage"], entry],
        }


def token_kind(name: str) -> str | None:
    """The kind of tokens in a tensor, None where it holds none."""
    match = _TOKENS.fullmatch(name)
    if match is None:
        return None
    return match[2] or ("proj" if match[1] == "proj" else "qkv")


def plan_growth(metadata: Mapping[str, Any], request: str) -> GrowthPlan:
    """The plan for a request such as "qkv=384,ffn=1536". Raises CheckpointError for one that can't be exact."""
    model = metadata["model"]
    if model["norm_activation"] == "softmax":
        raise CheckpointError(
            "a softmax model cannot be grown exactly by zero keys: "
            "each new token takes a share exp(0) = 1 of every row's sum"
        )
    tokens = {}
    for kind, new in parse_growth(request).items():
        old = model[f"{kind}_tokens"]
        if new <= old:
            raise CheckpointError(
                f"--grow {kind}={new}: the checkpoint has {old} tokens already; growth only adds, shrinking is not "
                f"supported: ask for more than {old}, or leave {kind} out"
            )
        tokens[kind] = (old, new)
    std = 2.0 / (model["num_layers"] * math.sqrt(model["hidden_size"]))
    return GrowthPlan(tokens, std, metadata["config"]["training"]["seed"])


def parse_growth(request: str) -> dict[str, int]:
    """Kind -> new number of tokens, from "qkv=N,proj=N,ffn=N" or some of these."""
    counts: dict[str, int] = {}
    for part in request.split(","):
        kind, _, number = (word.strip() for word in part.partition("="))
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KINDS)}"
            raise CheckpointError(f"--grow: unknown kind {kind!r}; {hint}")
        if not number.isdecimal():
            raise CheckpointError(f"--grow {part.strip()}: write KIND=NUMBER, such as ffn=4096")
        if kind in counts:
            raise CheckpointError(f"--grow: {kind} is given twice, as {counts[kind]} and {number}")
        counts[kind] = int(number)
    return counts
