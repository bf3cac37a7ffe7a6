"""Growth of the width by 3/2: each block of two channels of the residual stream becomes three, mixed by a matrix C.

A weight K that reads the stream becomes (2/3) K C^T, and V that writes it V C^T. Heads can't be mixed, because rotary
tables and softmax act within each. So they are repeated from the first on: half of them get a second copy, and what
reads their outputs is divided by the number of copies. The weight w of the final norm acts channel by channel: the new
one is the solution of C^T diag(w') C = diag(w).

Adam works channel by channel as well, so no moments of mixed channels would be those of a wider model that took the
same steps: they restart from zero. Updates of what reads are scaled by 2/3, as for an integer, which preserves
their effect on the output to first order only.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_tf.checkpoint.columns import ColumnMap, ColumnNoise, DirectionalNoise, Mixed, Repeated, RingNoise
from megatron_tf.checkpoint.generations import Run
from megatron_tf.checkpoint.transformed import MappedVector, Normal
from megatron_tf.growth.axes import Axis, axes_of
from megatron_tf.growth.parts import MODEL, Part, Scales, rows_of
from megatron_tf.growth.widening import Widening
from megatron_tf.tokenformer.parameters import Parameter, Role

_ROOT = math.sqrt(3)
_MIX = (
    (1.0, 0.0),
    ((1 + _ROOT) / 4, (3 - _ROOT) / 4),
    ((1 - _ROOT) / 4, (3 + _ROOT) / 4),
)
"""Rows of C: three new channels of a block, by the two old ones."""
_ORTHOGONAL = (2 * _ROOT, -3 - _ROOT, 3 - _ROOT)
"""The direction orthogonal to both columns of C."""
_SHARE = 2 / 3
_NORM_WEIGHT = (
    (1.0, -1 / 3),
    (0.0, 2 / 3),
    (0.0, 2 / 3),
)


class UnevenWidth(Widening):
    """Builds the parts of each tensor of a model that becomes 1.5 times as wide."""

    def parts(self, old: Parameter, new: Parameter) -> list[Part]:
        """Return one part, or one for each range of rows with its own number of copies."""
        axis = axes_of(old)[0]
        rows = old.shape[0]
        half = rows // 2
        if axis is Axis.UNITS:
            return [self._rows(old, 0, rows, place=0)]
        if len(old.shape) == 1:
            return [self._vector(old, new.shape[0])]
        if not axis.reads:
            return [self._rows(old, 0, rows, place=0), self._rows(old, 0, half, place=rows)]
        return [
            self._shared_rows(old, half, number=0),
            self._rows(old, half, rows, place=half),
            self._shared_rows(old, half, number=1),
        ]

    def _vector(self, old: Parameter, count: int) -> Part:
        """Return the final norm's weight or bias."""
        run, *others = self.runs(old)
        assert not others  # the final norm has never been grown in parts
        part = self._copied(old, [Run(count, run.generation)], scales=Scales(step=_SHARE))
        matrix: Sequence[Sequence[float]] = _NORM_WEIGHT
        if old.role is Role.BIAS:
            matrix = [[factor * _SHARE for factor in factors] for factors in _MIX]
        return replace(part, segments={**part.segments, MODEL: MappedVector(old.name, count, Mixed(matrix))})

    def _rows(self, old: Parameter, start: int, stop: int, *, place: int) -> Part:
        """Return old rows [start, stop), which are at `place` in the new tensor."""
        runs = rows_of(self.runs(old), start, stop)
        return self._copied(old, runs, start=start, place=place, scales=self._scales(old))

    def _shared_rows(self, old: Parameter, count: int, *, number: int) -> Part:
        """Return copy `number` of two of the first rows, divided among both."""
        return self._copied(
            old,
            rows_of(self.runs(old), 0, count),
            scales=self._scales(old) * Scales(value=1 / 2),
            noise=self.ring(old, count, number=number, copies=2),
        )

    def _scales(self, old: Parameter) -> Scales:
        axes = axes_of(old)
        scales = Scales(step=_SHARE) if any(axis.reads for axis in axes) else Scales()
        return scales * Scales(value=_SHARE) if Axis.READS_HIDDEN in axes else scales

    def _copied(
        self,
        old: Parameter,
        runs: list[Run],
        *,
        scales: Scales,
        start: int = 0,
        place: int = 0,
        noise: Sequence[Normal] = (),
    ) -> Part:
        """Return the rows of `runs`, from `start` on in the old tensor and from `place` on in the new one."""
        columns, column_noise = self._columns(old, sum(run.count for run in runs), place=place)
        return self.maker.copied(
            old.name,
            runs,
            start=start,
            scales=scales,
            noise=noise,
            columns=columns,
            column_noise=column_noise,
            is_in_layer=old.layer is not None,
            has_moments=False,
        )

    def _columns(self, old: Parameter, rows: int, *, place: int) -> tuple[ColumnMap | None, ColumnNoise | None]:
        """Return what becomes of the columns of some rows at `place`."""
        _, *axes = axes_of(old)
        if not axes:
            return None, None
        (axis,) = axes
        columns = Repeated(is_divided=axis.reads) if axis.counts_heads else Mixed(_MIX)
        if not axis.reads or (noise := self.noise(old, rows, start=place)) is None:
            return columns, None
        if axis.counts_heads:
            return columns, RingNoise(noise, old.shape[1])
        return columns, DirectionalNoise(noise, _ORTHOGONAL)
