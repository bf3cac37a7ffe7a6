"""Growth of the width by an integer m: the residual stream h becomes m copies [h, ..., h], and so do the heads.

Heads keep their size, so rotary tables stay the same. `axes` has the table of what is copied and what is divided, and
how Adam moments and updates follow. Noise on what is divided, which sums to zero over the copies, keeps the output and
lets the copies diverge: the gradients of the weights that write the stream become different.
"""

from megatron_tf.checkpoint.columns import Repeated, RingNoise
from megatron_tf.growth.axes import Axis, axes_of, scales_of
from megatron_tf.growth.parts import Part
from megatron_tf.growth.widening import Widening
from megatron_tf.tokenformer.parameters import Parameter


class IntegerWidth(Widening):
    """Builds the parts of each tensor of a model that becomes an integer times as wide."""

    def parts(self, old: Parameter, new: Parameter) -> list[Part]:
        """Return a part for each copy of the rows: one, unless their number follows the width."""
        copies = new.shape[-1] // old.shape[-1]
        row_copies = 1 if axes_of(old)[0] is Axis.UNITS else copies
        return [self._copy(old, number=number, copies=copies) for number in range(row_copies)]

    def _copy(self, old: Parameter, *, number: int, copies: int) -> Part:
        """Return copy `number` of the old rows, with all copies of their columns."""
        rows, *columns = old.shape
        row_axis, *column_axes = axes_of(old)
        column_noise = None
        # the copies of a row have noise of their own
        if any(axis.reads for axis in column_axes) and (noise := self.noise(old, rows, start=number * rows)):
            column_noise = RingNoise(noise, *columns)
        has_row_noise = row_axis.reads and column_axes
        return self.maker.copied(
            old.name,
            self.runs(old),
            scales=scales_of(axes_of(old), copies),
            noise=self.ring(old, rows, number=number, copies=copies) if has_row_noise else [],
            columns=Repeated() if column_axes else None,
            column_noise=column_noise,
            is_in_layer=old.layer is not None,
        )
