"""Growth of a checkpoint: more parameter tokens, more layers, what its model computes kept.

zero_key. A key of zeros scores zero on every input: under both L2 normalisations it adds nothing to the row's norm,
and its weight gelu(0) is zero, so the output stays provided that tau is kept. The new values are drawn as at birth:
they give the new keys a gradient at the first step. Under softmax exp(0) = 1, which is a share of every row's sum:
refused.

duplicate. With m equal copies of every token, and its value shared out among them (V/m), the L2 norm of a row is
sqrt(m) times and the sum of a softmax m times what it was; so with tau times sqrt(m), or m, each weight and the
output stay. Noise on the values, which adds up to zero over the copies of a token, lets them part: dK depends on V.
The gradient of a key is 1/m of what it was, that of a value is the same: so Adam's moments of keys are scaled by 1/m
and 1/m^2. Tokens beyond a multiple have zero keys.

random. What the official code does: keys and values as at birth, tau = sqrt(N) of the new N, no moments. Not exact.

Layers. A new layer whose last values (of proj and ffn) are zero adds nothing to the residual stream: it is the
identity, and those values have a gradient at the first step.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tf.checkpoint.derived import (
    Checkpoint,
    Copy,
    DerivedCheckpoint,
    Normal,
    Recipe,
    Segment,
    Zeros,
    copied,
    with_model,
)
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.config import (
    TOKEN_KINDS,
    ConfigError,
    GrowthStage,
    ModelConfig,
    grown_model,
    layer_origins,
    parse_config,
)
from megatron_tf.kernels.normalisation import NORMALISATIONS
from megatron_tf.parallel.random import value_token_std

_TOKENS = re.compile(r"layers\.(\d+)\.(?:attention\.(query|key|value|proj)|(ffn))\.(key|value)_tokens")
_POWER = {"model": 1, "exp_avg": 1, "exp_avg_sq": 2}
"""Group -> how it scales with a gradient or a value."""


@dataclass(frozen=True)
class TokenTensor:
    """What the name of a tensor of parameter tokens says."""

    layer: int
    kind: str
    module: str
    is_value: bool

    @property
    def ends_branch(self) -> bool:
        """Whether these are the values that are added to the residual stream."""
        return self.is_value and self.kind != "qkv"


def parse_name(name: str) -> TokenTensor | None:
    """Of a tensor of parameter tokens; None for any other."""
    match = _TOKENS.fullmatch(name)
    if match is None:
        return None
    kind = match[3] or ("proj" if match[2] == "proj" else "qkv")
    return TokenTensor(int(match[1]), kind, name.rpartition(".")[0], match[4] == "value")


def grow(source: Checkpoint, stage: GrowthStage) -> DerivedCheckpoint:
    """The checkpoint after `stage`. Raises CheckpointError where that can't be, or the source contradicts itself."""
    return _Growth(source, stage).derived()


class _Growth:
    def __init__(self, source: Checkpoint, stage: GrowthStage) -> None:
        self.source, self.stage = source, stage
        self.model = parse_config(ModelConfig, source.metadata["model"], str(source.directory))
        try:
            self.grown = grown_model(self.model, stage)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        self.norm = NORMALISATIONS[self.model.norm_activation]
        self.seed: int = source.metadata["config"]["training"]["seed"]
        self.origin = layer_origins(self.model.num_layers, sorted(stage.insert_layers))
        self.value_std = value_token_std(self.grown.num_layers, self.grown.hidden_size)
        self.birth = f"growth.{len(source.metadata['lineage'])}"

    def derived(self) -> DerivedCheckpoint:
        recipes = {
            group: {name: self._recipe(group, name) for name in self._names(group)} for group in self.source.groups()
        }
        return DerivedCheckpoint(self.source, recipes, self._metadata())

    def _names(self, group: str) -> list[str]:
        """Of the grown model, in its order."""
        before: list[str] = []
        inside: dict[int, list[str]] = {}
        after: list[str] = []
        for name in self.source.names(group):
            if name.startswith("layers."):
                layer, _, rest = name.removeprefix("layers.").partition(".")
                inside.setdefault(int(layer), []).append(rest)
            else:
                (after if inside else before).append(name)
        layers = [
            f"layers.{i}.{rest}" for i, old in enumerate(self.origin) for rest in inside[0 if old is None else old]
        ]
        return [*before, *layers, *after]

    def _recipe(self, group: str, name: str) -> Recipe:
        token = parse_name(name)
        if token is None:
            return self._kept(group, copied(self.source, group, name))
        old_layer = self.origin[token.layer]
        old_name = name.replace(f"layers.{token.layer}.", f"layers.{old_layer or 0}.", 1)
        rows, columns = self.source.shape(group, old_name)
        new = self.grown.token_counts(token.kind)[token.layer]
        if old_layer is None:
            segments = [self._born(group, name, token, new)]
        else:
            expected = self.model.token_counts(token.kind)[old_layer]
            if rows != expected:
                raise CheckpointError(
                    f"{old_name} has {rows} rows, the checkpoint's metadata says {token.kind}_tokens = {expected}"
                )
            segments = self._appended(group, name, old_name, token, rows, new)
        return self._kept(group, Recipe(self.source.dtype(group, old_name), (columns,), segments))

    def _kept(self, group: str, recipe: Recipe) -> Recipe:
        """The recipe, or zeros for moments that are reset."""
        if group == "model" or self.stage.moments == "keep":
            return recipe
        return Recipe(recipe.dtype, recipe.columns, [Zeros(recipe.shape[0])])

    def _born(self, group: str, name: str, token: TokenTensor, count: int) -> Segment:
        """A tensor of a new layer."""
        if group != "model" or token.ends_branch:
            return Zeros(count)
        std = self.value_std if token.is_value else self.grown.init_method_std
        return Normal(f"{self.birth}.{name}", self.seed, 0, count, std)

    def _appended(self, group: str, name: str, old_name: str, token: TokenTensor, old: int, new: int) -> list[Segment]:
        """Old rows and what follows them."""
        if new == old:
            return [Copy(old_name, 0, old)]
        if self.stage.init == "duplicate":
            copies = [self._copy(group, name, old_name, token, old, c, new // old) for c in range(new // old)]
        else:
            copies = [Copy(old_name, 0, old)]
        rest = new - sum(map(len, copies))
        is_drawn = group == "model" and (token.is_value or self.stage.init == "random")
        if not rest:
            return [*copies]
        if not is_drawn:
            return [*copies, Zeros(rest)]
        std = self.value_std if token.is_value else self.grown.init_method_std
        return [*copies, Normal(name, self.seed, new - rest, new, std)]

    def _copy(
        self, group: str, name: str, old_name: str, token: TokenTensor, old: int, number: int, copies: int
    ) -> Copy:
        """Copy `number` of the old rows."""
        is_shared = token.is_value == (group == "model")  # values share out V, moments of keys the gradient
        scale = copies ** -_POWER[group] if is_shared else 1.0
        noise: list[Normal] = []
        if group == "model" and token.is_value:
            streams = (f"{self.birth}.{name}.copy{i % copies}" for i in (number, number + 1))
            noise = [Normal(stream, self.seed, 0, old, self.stage.noise * self.value_std) for stream in streams]
        return Copy(old_name, 0, old, scale, noise)

    def _metadata(self) -> dict[str, Any]:
        metadata, stage = self.source.metadata, self.stage
        changes: dict[str, Any] = {"num_layers": self.grown.num_layers}
        changes |= {f"{kind}_tokens": getattr(self.grown, f"{kind}_tokens") for kind in TOKEN_KINDS}
        kinds = {
            kind: [getattr(config, f"{kind}_tokens") for config in (self.model, self.grown)] for kind in TOKEN_KINDS
        }
        training = dict(metadata["training"])
        entry = {
            **{key: training[key] for key in ("step", "samples", "tokens")},
            "kinds": {kind: change for kind, change in kinds.items() if change[0] != change[1]},
            "init": stage.init,
            "seed": self.seed,
        }
        if stage.insert_layers:
            entry["inserted_layers"] = [i for i, old in enumerate(self.origin) if old is None]
        if stage.moments == "reset":
            training["adam_steps"] = 0
        return {
            **with_model(metadata, changes),
            "tau": self._tau(),
            "training": training,
            "lineage": [*metadata["lineage"], entry],
            "after_growth": {
                "step": training["step"],
                "rewarmup_iters": stage.rewarmup_iters,
                "old_tokens_lr_scale": stage.old_tokens_lr_scale,
                "old_rows": self._old_rows(),
            },
        }

    def _tau(self) -> dict[str, float]:
        """Temperatures: kept, but of duplicated, random and new modules."""
        old_tau: Mapping[str, float] = self.source.metadata["tau"]
        tau = {}
        for name in self._names("model"):
            token = parse_name(name)
            if token is None or token.is_value:
                continue
            old_layer, new = self.origin[token.layer], self.grown.token_counts(token.kind)[token.layer]
            born = self.norm.tau_at_birth(new)
            if old_layer is None:
                tau[token.module] = born
                continue
            old = self.model.token_counts(token.kind)[old_layer]
            tau[token.module] = old_tau[token.module.replace(f"layers.{token.layer}.", f"layers.{old_layer}.", 1)]
            if self.stage.init == "duplicate":
                tau[token.module] *= (new // old) ** (1 / self.norm.tau_power)
            elif self.stage.init == "random" and new > old:
                tau[token.module] = born
        return tau

    def _old_rows(self) -> dict[str, int]:
        """Rows of each tensor of parameter tokens that were there before the growth."""
        rows = {}
        for name in self._names("model"):
            if (token := parse_name(name)) is not None:
                old = self.origin[token.layer]
                rows[name] = 0 if old is None else self.model.token_counts(token.kind)[old]
        return rows
