"""Growth of a checkpoint: more parameter tokens, more layers, what its model computes kept.

zero_key. A key of zeros scores zero on every input: under both L2 normalisations it adds nothing to the row's norm,
and its weight gelu(0) is zero, so the output stays provided that tau is kept. The new values are drawn as in a new
model: they give the new keys a gradient at the first step. Under softmax exp(0) = 1, which is a share of every row's
sum: refused.

duplicate. With m equal copies of every token, and its value shared out among them (V/m), the L2 norm of a row is
sqrt(m) times and the sum of a softmax m times what it was; so with tau times sqrt(m), or m, each weight and the
output stay. Noise on the values, which adds up to zero over the copies of a token, lets them part: dK depends on V.
The gradient of a key is 1/m of what it was, that of a value is the same: so Adam's moments of keys are scaled by 1/m
and 1/m^2. Tokens beyond a multiple have zero keys.

random. What the official code does: keys and values as in a new model, tau = sqrt(N) of the new N, no optimizer state.
Not exact.

Layers. A new layer whose last values (of proj and ffn) are zero adds nothing to the residual stream: it is the
identity, and those values have a gradient at the first step.
"""

from collections.abc import Mapping
from dataclasses import replace

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import AfterGrowth, GrowthEvent, RunRecord
from megatron_tf.checkpoint.transformed import Copy, Normal, Recipe, Segment, TransformedCheckpoint, Zeros, copied
from megatron_tf.config import TOKEN_KINDS, ConfigError, GrowthStage, grown_model, layer_origins
from megatron_tf.tokenformer.normalisation import NORMALISATIONS
from megatron_tf.tokenformer.parameters import Parameter, Role, initial_taus, key_tokens, model_parameters

_POWER = {"model": 1, "exp_avg": 1, "exp_avg_sq": 2}
"""Group -> how it scales with a gradient or a value."""


def grow(source: Checkpoint, stage: GrowthStage) -> TransformedCheckpoint:
    """Derive the checkpoint after `stage`.

    Raises CheckpointError where the model can't grow so, or where the source contradicts itself.
    """
    return _Growth(source, stage).transformed()


class _Growth:
    """Maps each parameter of the grown model to what it is made from."""

    def __init__(self, source: Checkpoint, stage: GrowthStage) -> None:
        self.source = source
        self.stage = stage
        self.model = source.record.model
        try:
            self.grown = grown_model(self.model, stage)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        self.old = model_parameters(self.model)
        self.new = model_parameters(self.grown)
        self.origin = layer_origins(self.model.num_layers, sorted(stage.insert_layers))
        self.seed = source.record.seed
        self.stream = f"growth.{len(source.record.lineage)}"
        """Random values that only this growth draws come from streams whose names begin with it."""

    def transformed(self) -> TransformedCheckpoint:
        recipes = {group: self._recipes(group) for group in self.source.groups()}
        return TransformedCheckpoint(self.source, recipes, self._record())

    def _recipes(self, group: str) -> dict[str, Recipe]:
        """Of the grown model's tensors in a group, in the model's order."""
        held = {parameter.name for parameter in held_parameters(self.source, group)}
        recipes = {}
        for parameter in self.new.values():
            if self._template(parameter).name in held:
                recipe = self._recipe(group, parameter)
                is_reset = group != "model" and self.stage.moments == "reset"
                recipes[parameter.name] = _zeros_like(recipe) if is_reset else recipe
        return recipes

    def _before(self, parameter: Parameter) -> Parameter | None:
        """What a parameter was before the growth; None in a new layer."""
        if parameter.layer is None:
            return self.old[parameter.name]
        old_layer = self.origin[parameter.layer]
        return None if old_layer is None else self.old[parameter.name_in_layer(old_layer)]

    def _template(self, parameter: Parameter) -> Parameter:
        """As `_before`; for a new layer, the one of the first layer, which has the same type and row shape."""
        return self._before(parameter) or self.old[parameter.name_in_layer(0)]

    def _recipe(self, group: str, parameter: Parameter) -> Recipe:
        template = self._template(parameter)
        if not parameter.is_token:
            return copied(self.source, group, template.name)
        old, new = self._before(parameter), parameter.shape[0]
        rows, columns = self.source.shape(group, template.name)
        segments: list[Segment]
        if old is None:
            segments = [self._rows_of_new_layer(group, parameter)]
        elif rows != old.shape[0]:
            raise CheckpointError(
                f"{old.name} has {rows} rows, the checkpoint's metadata says {old.kind}_tokens = {old.shape[0]}"
            )
        elif new == rows:
            segments = [Copy(old.name, 0, rows)]
        else:
            segments = self._appended(group, parameter, old)
        return Recipe(self.source.dtype(group, template.name), (columns,), segments)

    def _rows_of_new_layer(self, group: str, parameter: Parameter) -> Segment:
        count = parameter.shape[0]
        # zero at the end of a branch makes the layer the identity; Adam moments begin at zero, as in a new run
        if group != "model" or parameter.ends_branch:
            return Zeros(count)
        return Normal(f"{self.stream}.{parameter.name}", seed=self.seed, start=0, stop=count, std=parameter.initial.std)

    def _appended(self, group: str, parameter: Parameter, old: Parameter) -> list[Segment]:
        """Old rows, or copies of them, and what follows them."""
        rows, new = old.shape[0], parameter.shape[0]
        segments: list[Segment] = [Copy(old.name, 0, rows)]
        if self.stage.init == "duplicate":
            segments = [self._copy(group, parameter, old, number=number) for number in range(new // rows)]
        # values are drawn under each init: with values of zero, zero keys would never get a gradient
        rest = new - sum(map(len, segments))
        is_drawn = group == "model" and (parameter.role is Role.VALUES or self.stage.init == "random")
        if rest and is_drawn:
            # the rows that a new model of this size would have in their place
            segments.append(
                Normal(parameter.name, seed=self.seed, start=new - rest, stop=new, std=parameter.initial.std)
            )
        elif rest:
            segments.append(Zeros(rest))
        return segments

    def _copy(self, group: str, parameter: Parameter, old: Parameter, *, number: int) -> Copy:
        """Copy `number` of the old rows."""
        rows = old.shape[0]
        copies = parameter.shape[0] // rows
        is_value = parameter.role is Role.VALUES
        is_shared = is_value == (group == "model")  # values share out V, moments of keys the gradient
        scale = copies ** -_POWER[group] if is_shared else 1.0
        noise: list[Normal] = []
        if group == "model" and is_value:
            # each stream is added to one copy and taken from the next one around the ring
            streams = [f"{self.stream}.{parameter.name}.copy{i % copies}" for i in (number, number + 1)]
            std = self.stage.noise * parameter.initial.std
            noise = [Normal(stream, seed=self.seed, start=0, stop=rows, std=std) for stream in streams]
        return Copy(old.name, 0, rows, scale=scale, noise=noise)

    def _record(self) -> RunRecord:
        record, stage = self.source.record, self.stage
        training = record.training
        changes = {}
        for kind in TOKEN_KINDS:
            changes[kind] = [getattr(config, f"{kind}_tokens") for config in (self.model, self.grown)]
        event = GrowthEvent(
            step=training.step,
            samples=training.samples,
            tokens=training.tokens,
            kinds={kind: change for kind, change in changes.items() if change[0] != change[1]},
            init=stage.init,
            seed=self.seed,
            inserted_layers=[i for i, old in enumerate(self.origin) if old is None],
        )
        return replace(
            record.with_model(self.grown),
            tau=self._tau(),
            # the bias correction starts again with the moments
            training=replace(training, adam_steps=0) if stage.moments == "reset" else training,
            lineage=(*record.lineage, event),
            after_growth=AfterGrowth(
                step=training.step,
                rewarmup_iters=stage.rewarmup_iters,
                old_tokens_lr_scale=stage.old_tokens_lr_scale,
                old_rows=self._old_rows(),
            ),
            growth_stage=None,  # a run that grows knows it, the tool does not
        )

    def _tau(self) -> dict[str, float]:
        """Temperatures: kept, but of duplicated, random and new modules."""
        norm = NORMALISATIONS[self.model.norm_activation]
        old_tau: Mapping[str, float] = self.source.record.tau
        initial = initial_taus(self.grown)
        tau = {}
        for path, keys in key_tokens(self.grown).items():
            old = self._before(keys)
            if old is None or (self.stage.init == "random" and keys.shape != old.shape):
                tau[path] = initial[path]
                continue
            tau[path] = old_tau[old.path]
            # m copies make the L2 norm sqrt(m) times, and the sum of a softmax m times, what it was
            if self.stage.init == "duplicate":
                tau[path] *= (keys.shape[0] // old.shape[0]) ** (1 / norm.tau_power)
        return tau

    def _old_rows(self) -> dict[str, int]:
        """Rows of each tensor of parameter tokens that were there before the growth."""
        rows = {}
        for parameter in self.new.values():
            if parameter.is_token:
                old = self._before(parameter)
                rows[parameter.name] = 0 if old is None else old.shape[0]
        return rows


def _zeros_like(recipe: Recipe) -> Recipe:
    return Recipe(recipe.dtype, recipe.columns, [Zeros(recipe.shape[0])])
