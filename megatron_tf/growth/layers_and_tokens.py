"""Growth by layers, and by parameter tokens or hidden units: which rows a grown tensor consists of.

For a Pattention y = P V with scores A = X K^T; the MLP of a plain transformer is the same without a norm of the rows,
with the rows of its up projection for keys and those of its down projection for values.

zero_key. A zero key scores zero on every input. Under both L2 normalizations it adds nothing to the norm of a row, and
its weight gelu(0) is zero, so the output does not change as long as tau is kept. New values are initialized as in a new
model, which gives the new keys a gradient at the first step. Under softmax a new token would add exp(0) = 1 to the sum
of every row, so it is refused.

zero_value. The reverse: keys as in a new model, zero values. Exact for an MLP. In a Pattention the new keys add to the
norm of the rows, by an amount that depends on the input; tau is scaled by sqrt(N'/N), or for softmax by N'/N, which
makes up for keys that are as large as the old ones.

A gated MLP multiplies two of its three factors before the down projection: silu(gate x) * up x. Of a new unit exactly
one factor is zero, up or down, whose gradient is the product of the other two; the gate is as in a new model. With up
and gate both zero, no gradient would ever reach the unit.

rotated_key, for l2_norm_gelu only. The m - 1 new copies of the keys are Q K with orthogonal matrices Q, and their
values are zero. The new scores A Q^T have the norm of the old ones on every input, so the norm of a row grows by
sqrt(m) exactly, and scaling tau by sqrt(m) preserves every weight. Unlike zero keys, the new ones differ from each
other and have weights from the start, so their values get a gradient at the first step. The gradient that changes the
norm of a row is shared between old and new keys; that of everything else stays. Tokens beyond a multiple get zero keys.

duplicate. With m equal copies of every token and its value divided among them (V/m), the L2 norm of a row grows by
sqrt(m) and the sum of a softmax by m. Scaling tau by sqrt(m), or by m, preserves every weight and thus the output.
Noise on the values, which sums to zero over the copies of a token, lets the copies diverge, because dK depends on V.
The gradient of a key becomes 1/m of what it was and that of a value does not change, so the Adam moments of keys are
scaled by 1/m and 1/m^2. An Adam update has the same size for V/m as for V: a step scale of 1/m makes up for it. Tokens
beyond a multiple get zero keys.

duplicate_by_utility. As duplicate, but each token has its own number of copies m_j, at least one, of which every factor
above is made. Not exact: the norm of a row grows by a factor that depends on the input, and tau is only scaled by the
mean factor on a text (`growth/utility.py`).

random. As in the official code: keys and values as in a new model, tau = sqrt(N) of the new N, no optimizer state.
Not exact.

Layers. A new layer whose last values (of proj and ffn) are zero adds nothing to the residual stream: it is the
identity, and those values have a gradient at the first step. The others are as in a new model (`identity`), or a copy
of the old layer (`copy_zero`), without its moments, since most of its gradients are zero at first. `copy` copies a
layer with its moments and is not exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.checkpoint.generations import Generations, Run
from megatron_tf.checkpoint.transformed import Constant, Normal, Rotated, Segment, Zeros
from megatron_tf.config import LayerSource, TokenInit
from megatron_tf.growth.parts import Part, PartMaker, Scales, total_rows
from megatron_tf.growth.utility import Utility
from megatron_tf.tokenformer.parameters import Module, Parameter, Role


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What a layer's rows are made of."""

    parameter: Parameter
    """The same parameter in the old layer."""
    is_new: bool
    """Whether the layer is new, so that even copied rows are."""


class LayersAndTokens:
    """Builds the parts of each tensor of a grown model.

    `old` are the parameters before the growth, `layers` the sources of the new layers, and `generations` those of the
    old rows. `stream` is the prefix of the random streams of this growth under the run's `seed`. `utility` is measured
    for `duplicate_by_utility`.
    """

    def __init__(
        self,
        maker: PartMaker,
        *,
        old: Mapping[str, Parameter],
        layers: Sequence[LayerSource],
        generations: Generations,
        seed: int,
        stream: str,
        utility: Utility | None = None,
    ) -> None:
        self.maker = maker
        self.stage = maker.stage
        self.old = old
        self.layers = layers
        self.generations = generations
        self.seed = seed
        self.stream = stream
        self.utility = utility

    def template(self, parameter: Parameter) -> Parameter:
        """Return the old parameter that one of the grown model continues or copies, or whose neighbor it is."""
        if parameter.layer is None:
            return self.old[parameter.name]
        return self.old[parameter.name_in_layer(self.layers[parameter.layer].layer)]

    def parts(self, parameter: Parameter) -> list[Part]:
        """Return the parts of a parameter of the grown model, in row order."""
        old = self.template(parameter)
        if parameter.layer is None:
            return [self.maker.copied(old.name, self._runs(old), is_in_layer=False)]
        is_new = self.layers[parameter.layer].is_new
        layer_init = self.stage.layer_init
        if is_new and (layer_init == "identity" or (layer_init == "copy_zero" and parameter.ends_branch)):
            return [self.maker.drawn(self._of_identity(parameter))]
        return self._appended(parameter, _Origin(parameter=old, is_new=is_new))

    def _runs(self, old: Parameter) -> list[Run]:
        return self.generations.runs(old.name, old.shape[0])

    def _of_identity(self, parameter: Parameter) -> Segment:
        """Return the rows of a new layer that is the identity."""
        count = parameter.shape[0]
        if parameter.ends_branch:
            return Zeros(count)
        if not parameter.initial.std:
            return Constant(parameter.initial.constant, count)
        return Normal(f"{self.stream}.{parameter.name}", seed=self.seed, start=0, stop=count, std=parameter.initial.std)

    def _appended(self, parameter: Parameter, origin: _Origin) -> list[Part]:
        """Return the old rows, or copies of them, followed by the new rows."""
        rows, new = origin.parameter.shape[0], parameter.shape[0]
        if new > rows and self._init(parameter) == "duplicate_by_utility":
            return self._copied_by_utility(parameter, origin)
        copies = new // rows if self._init(parameter) == "duplicate" else 1
        parts = [self._copy(parameter, origin, number=number, copies=copies) for number in range(copies)]
        if new > rows and self._init(parameter) == "rotated_key":
            parts += [self.maker.drawn(self._rotated(parameter, origin, number)) for number in range(1, new // rows)]
        if rest := new - total_rows(parts):
            parts.append(self.maker.drawn(self._new_rows(parameter, new - rest)))
        return parts

    def _init(self, parameter: Parameter) -> TokenInit:
        is_token = parameter.role in (Role.KEYS, Role.VALUES)
        init = self.stage.init if is_token else self.stage.mlp_init
        assert init != "auto", "grow replaces it"
        return init

    def _new_rows(self, parameter: Parameter, start: int) -> Segment:
        """Return the rows from `start` on: zeros, or those that a new model of this size would have there."""
        init, stop = self._init(parameter), parameter.shape[0]
        # one factor only, or none would get a gradient; a gate is never the zero one
        is_zero = parameter.writes_output == (init == "zero_value") and parameter.module is not Module.FFN_GATE
        if is_zero and init != "random":
            return Zeros(stop - start)
        return Normal(parameter.name, seed=self.seed, start=start, stop=stop, std=parameter.initial.std)

    def _rotated(self, parameter: Parameter, origin: _Origin, number: int) -> Segment:
        """Return a rotation of the old keys, or the zero values of these new tokens."""
        old = origin.parameter
        if parameter.writes_output:
            return Zeros(old.shape[0])
        return Rotated(
            old.name, count=old.shape[0], stream=f"{self.stream}.{parameter.name}.rotation{number}", seed=self.seed
        )

    def _copy(self, parameter: Parameter, origin: _Origin, *, number: int, copies: int) -> Part:
        """Return copy `number` of the old rows."""
        old = origin.parameter
        return self.maker.copied(
            old.name,
            self._runs(old),
            scales=_scales(parameter, copies),
            noise=self._ring(parameter, old.shape[0], number=number, copies=copies),
            is_new=origin.is_new or number > 0,
            has_moments=self._copies_moments(origin),
        )

    def _copied_by_utility(self, parameter: Parameter, origin: _Origin) -> list[Part]:
        """Return the old rows, or copies of them, followed by the further copies of each.

        Those of rows with the same number of copies are next to each other, so that few generations alternate.
        """
        assert self.utility is not None, "grow checks it"
        copies = torch.tensor(self.utility.copies[parameter.path])
        everything = torch.arange(len(copies))
        # number 0 adds the noise of copy 0 and subtracts that of copy 1, whatever the number of copies
        parts = [self._selected(parameter, origin, everything, copies=copies, number=0, ring=2)]
        for count in sorted(set(copies.tolist()) - {1}):
            rows = everything[copies == count]
            for number in range(1, count):
                parts.append(self._selected(parameter, origin, rows, copies=copies, number=number, ring=count))
        return parts

    def _selected(
        self, parameter: Parameter, origin: _Origin, rows: Tensor, *, copies: Tensor, number: int, ring: int
    ) -> Part:
        """Return copy `number` of some of the old rows, which have `copies` [old rows] each, in a ring of that many."""
        old = origin.parameter
        of_row = [run.generation for run in self._runs(old) for _ in range(run.count)]
        scales = {count: _scales(parameter, count) for count in set(copies.tolist())}
        return self.maker.selected(
            old.name,
            rows,
            generations=[of_row[row] for row in rows.tolist()],
            scales=[scales[count] for count in copies[rows].tolist()],
            noise=self._ring(parameter, old.shape[0], number=number, copies=ring),
            is_new=origin.is_new or number > 0,
            has_moments=self._copies_moments(origin),
        )

    def _copies_moments(self, origin: _Origin) -> bool:
        return not (origin.is_new and self.stage.layer_init == "copy_zero")

    def _ring(self, parameter: Parameter, rows: int, *, number: int, copies: int) -> list[Normal]:
        """Return noise to add to a copy and noise to subtract, which is what is added to the next one around a ring.

        Only what writes an output has noise, and only where there is more than one copy.
        """
        if copies == 1 or not parameter.writes_output or not self.stage.noise:
            return []
        streams = [f"{self.stream}.{parameter.name}.copy{i % copies}" for i in (number, number + 1)]
        std = self.stage.noise * parameter.initial.std
        return [Normal(stream, seed=self.seed, start=0, stop=rows, std=std) for stream in streams]


def _scales(parameter: Parameter, copies: int) -> Scales:
    """Return the factors of each of `copies` equal copies."""
    if parameter.writes_output:
        return Scales(value=1 / copies, step=1 / copies)
    return Scales(gradient=1 / copies)
