"""Which dimensions of a parameter follow the width of the model, and in which role.

Growing the width replaces the residual stream h by copies [h, ..., h], and so does attention with its heads. A
dimension of a weight that *reads* such a stream is divided by the number of copies m, so that their sum is what it was.
One that *writes* is copied. For a loss L, the chain rule gives each copy's gradient, as long as copies are equal:

|        | value | gradient | Adam update |
|--------|-------|----------|-------------|
| reads  | 1/m   | 1        | 1/m         |
| writes | 1     | 1/m      | 1           |

A weight that does both has the products. The embedding writes the stream; the head counts as writing as well, because
the final norm in front of it is what is divided.
"""

from enum import Enum, auto

from megatron_tf.growth.parts import Scales
from megatron_tf.tokenformer.parameters import Module, Parameter, Role


class Axis(Enum):
    """What a dimension of a parameter counts."""

    UNITS = auto()
    """Parameter tokens, hidden units, ids or channels of one head, whose number does not follow the width."""
    READS_HIDDEN = auto()
    """Channels of the residual stream that it takes in."""
    WRITES_HIDDEN = auto()
    """Channels of the residual stream that it adds to, or is the embedding of."""
    READS_HEADS = auto()
    """Channels of the heads' outputs."""
    WRITES_HEADS = auto()
    """Channels of the heads' queries, keys or values."""

    @property
    def reads(self) -> bool:
        """Return whether it is divided among the copies."""
        return self in (Axis.READS_HIDDEN, Axis.READS_HEADS)

    @property
    def counts_heads(self) -> bool:
        """Return whether its channels belong to heads."""
        return self in (Axis.READS_HEADS, Axis.WRITES_HEADS)


_NORMS = {
    Module.FINAL_NORM: Axis.READS_HIDDEN,
    # copied, because what reads their outputs is divided
    Module.ATTENTION_NORM: Axis.WRITES_HIDDEN,
    Module.FFN_NORM: Axis.WRITES_HIDDEN,
    # shared by all heads, whose size does not change
    Module.QUERY_NORM: Axis.UNITS,
    Module.KEY_NORM: Axis.UNITS,
}
_QKV = (Module.QUERY, Module.KEY, Module.VALUE)


def axes_of(parameter: Parameter) -> tuple[Axis, ...]:
    """Return what each dimension of a parameter counts."""
    module, role = parameter.module, parameter.role
    if module in _NORMS:
        return (_NORMS[module],)
    reads, writes = Axis.READS_HIDDEN, Axis.WRITES_HIDDEN
    if module in _QKV:
        writes = Axis.WRITES_HEADS
    elif module is Module.PROJ:
        reads = Axis.READS_HEADS
    if role is Role.KEYS or module in (Module.FFN_GATE, Module.FFN_UP):
        return (Axis.UNITS, reads)
    if role is Role.WEIGHT and module in _QKV:
        return (writes, reads)
    if role is Role.WEIGHT and module is Module.PROJ:  # it is stored transposed: a row for each of its inputs
        return (reads, writes)
    return (Axis.UNITS, writes)


def scales_of(axes: tuple[Axis, ...], copies: int) -> Scales:
    """Return the factors of each of equal copies of a tensor with these axes."""
    scales = Scales()
    for axis in axes:
        if axis.reads:
            scales *= Scales(value=1 / copies, step=1 / copies)
        elif axis is not Axis.UNITS:
            scales *= Scales(gradient=1 / copies)
    return scales
