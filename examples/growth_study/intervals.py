"""Means over paired seeds with 95 % intervals, and interpolation along the curve of a model trained from scratch."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom."""
_BEYOND, _SAME = 0.05, 0.01
MIN_SEEDS = 3
"""Fewer seeds give no interval that is worth reading."""
Point = tuple[float, float]
"""FLOPs and loss."""


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval; `low` and `high` are the mean if there is one value only."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def has_too_few(self) -> bool:
        """Whether more seeds are needed."""
        return self.count < MIN_SEEDS

    def exp(self) -> "Interval":
        """Return the interval of a ratio from that of its logarithm."""
        return Interval(math.exp(self.mean), low=math.exp(self.low), high=math.exp(self.high), count=self.count)


def interval(values: Sequence[float]) -> Interval | None:
    """Return the t interval of the mean of independent values; None without any."""
    if not values:
        return None
    mean, count = fmean(values), len(values)
    if count == 1:
        return Interval(mean, low=mean, high=mean, count=1)
    half = _T[min(count - 1, len(_T)) - 1] * stdev(values) / math.sqrt(count)
    return Interval(mean, low=mean - half, high=mean + half, count=count)


def loss_at(curve: Sequence[Point], flops: float) -> float | None:
    """Return the loss of a curve at some FLOPs, linear in their logarithms; None outside the curve.

    Models of different families, and runs that end at whole steps, do not cost exactly the same: a twentieth beyond an
    end of the curve is still on the line of its last segment. A single point is the loss of all FLOPs within a
    hundredth of its own.
    """
    points = sorted(curve)
    if len(points) == 1 and abs(flops / points[0][0] - 1) <= _SAME:
        return points[0][1]
    if len(points) < 2 or not (1 - _BEYOND) * points[0][0] <= flops <= (1 + _BEYOND) * points[-1][0]:
        return None
    segment = next((pair for pair in pairwise(points) if flops <= pair[1][0]), (points[-2], points[-1]))
    return _on_line(*segment, flops)


def flops_at(curve: Sequence[Point], loss: float) -> float | None:
    """Return the FLOPs at which a curve first falls to a loss, linear in their logarithms; None outside the curve."""
    for (flops, before), (more_flops, after) in pairwise(sorted(curve)):
        if after <= loss <= before and after < before:
            return _on_line((before, flops), (after, more_flops), loss)
    return None


def _on_line(first: Point, second: Point, x: float) -> float:
    (x0, y0), (x1, y1) = first, second
    share = math.log(x / x0) / math.log(x1 / x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
