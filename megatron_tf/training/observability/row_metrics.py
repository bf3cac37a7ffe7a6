"""Metrics of the rows that each growth added, and how they appear in the log and in metrics."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tf.config import ParameterKind

_QUANTITIES = ("grad_norm", "update_norm")
_TOKEN_QUANTITIES = ("tokens", "contribution", "dead")


@dataclass(frozen=True, kw_only=True)
class RowMetrics:
    """The rows of one kind of parameter that one growth added, in one layer, during one step."""

    growth: int
    """Number of the growth, from 1; 0 for rows of the original model."""
    kind: ParameterKind
    layer: int | None
    """None for all layers together."""
    grad_norm: float
    """L2 norm of the gradient before clipping; 0 for frozen rows."""
    update_norm: float
    """L2 norm of what the step added to the rows, including weight decay."""
    tokens: int
    """Number of parameter tokens, or of hidden units of an MLP; 0 for weights, which have no contribution."""
    contribution: float
    """Root of the sum over the tokens j of |P_j V_j|^2, averaged over the rows of the input that were read."""
    dead: int
    """Number of tokens whose contribution is at most 1% of the median over the tokens of their module."""


def by_kind(rows: Iterable[RowMetrics]) -> list[RowMetrics]:
    """Combine all layers of each growth and kind."""
    parts: dict[tuple[int, ParameterKind], list[RowMetrics]] = {}
    for row in rows:
        parts.setdefault((row.growth, row.kind), []).append(row)
    return [_combined(part) for part in parts.values()]


def as_section(rows: Iterable[RowMetrics]) -> dict[str, Any]:
    """Return them as JSON: growth -> kind -> `layers` and, for each of these, every quantity to six digits."""
    section: dict[str, Any] = {}
    for row in rows:
        columns = section.setdefault(_name(row.growth), {}).setdefault(row.kind, {"layers": []})
        columns["layers"].append(row.layer)
        for name, value in _quantities(row).items():
            columns.setdefault(name, []).append(float(f"{value:.6g}") if isinstance(value, float) else value)
    return section


def as_scalars(rows: Iterable[RowMetrics]) -> dict[str, float]:
    """Return them for all layers together, by name: rows/KIND/QUANTITY/growth_N."""
    scalars = {}
    for row in by_kind(rows):
        for name, value in _quantities(row).items():
            scalars[f"rows/{row.kind}/{name}/{_name(row.growth)}"] = value
    return scalars


def describe(rows: Sequence[RowMetrics]) -> str:
    """Describe the share of the newest rows in all rows, in one line."""
    newest = max(row.growth for row in rows)
    new, everything = _combined([row for row in rows if row.growth == newest]), _combined(rows)
    shares = [
        f"{_share(part, whole):.2g} of the {name}"
        for name, part, whole in (
            ("gradient", new.grad_norm, everything.grad_norm),
            ("update", new.update_norm, everything.update_norm),
            ("contribution", new.contribution, everything.contribution),
        )
    ]
    return f"rows of growth {newest}: {', '.join(shares)}; {new.dead:,} of {new.tokens:,} tokens are dead"


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _name(growth: int) -> str:
    return f"growth_{growth}"


def _quantities(row: RowMetrics) -> Mapping[str, float]:
    names = [*_QUANTITIES, *(_TOKEN_QUANTITIES if row.tokens else ())]
    return {name: getattr(row, name) for name in names}


def _combined(rows: Sequence[RowMetrics]) -> RowMetrics:
    return RowMetrics(
        growth=rows[0].growth,
        kind=rows[0].kind,
        layer=None,
        grad_norm=math.hypot(*(row.grad_norm for row in rows)),
        update_norm=math.hypot(*(row.update_norm for row in rows)),
        tokens=sum(row.tokens for row in rows),
        contribution=math.hypot(*(row.contribution for row in rows)),
        dead=sum(row.dead for row in rows),
    )
