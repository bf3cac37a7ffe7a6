"""Growth of a model: one stage of it, and what the model becomes."""

import dataclasses
import difflib
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.model import TOKEN_KINDS, ModelConfig
from megatron_tf.config.types import STRICT, Count, NonNegative, Number, Size

LayerTokens = Size | dict[str, Size]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GrowthStage:
    """More parameter tokens, more layers, or both, and how training goes on after that."""

    at_step: Count | None = None
    """Grow in the run after this many optimizer steps."""
    at_tokens: Count | None = None
    """Grow in the run once this many tokens are trained on, in place of at_step."""
    qkv_tokens: LayerTokens | None = None
    """New number of tokens of each query, key and value; or a number for some layers: {"0-5": 384, "7": 512}, counted
    as they are after the growth."""
    proj_tokens: LayerTokens | None = None
    """New number of tokens of the attention's output."""
    ffn_tokens: LayerTokens | None = None
    """New number of tokens of the feed-forward."""
    insert_layers: list[NonNegative] = Field(default_factory=list)
    """A new layer, at first the identity, before each old layer named; the number of layers stands for the end."""
    init: Literal["zero_key", "duplicate", "random"] = "zero_key"
    """zero_key: new keys are zero, which changes no output. duplicate: tokens are split into equal copies, and what is
    left over has zero keys. random: as the official code grows; changes the output."""
    noise: Annotated[Number, Field(ge=0)] = 0.1
    """Noise on the values of copies, relative to values at birth; it adds up to zero over the copies of a token."""
    moments: Literal["keep", "reset"] = "keep"
    """Whether Adam's moments of what was there before are kept."""
    old_tokens_lr_scale: Annotated[Number, Field(ge=0)] = 1.0
    """Learning rate of the old parameter tokens relative to the new ones; 0 freezes them, decay included."""
    rewarmup_iters: NonNegative = 0
    """Steps of linear warm-up after the growth."""
    tensor_model_parallel_size: Count | None = None
    """Change the layout with the growth: the job ends with exit code 75 after saving, to be started again."""
    pipeline_model_parallel_size: Count | None = None
    """See tensor_model_parallel_size."""

    def is_due(self, step: int, tokens: int) -> bool:
        """Whether a run of so many steps and tokens has reached the stage."""
        reached = step if self.at_step is not None else tokens
        return reached >= (self.at_step or self.at_tokens or 0)


def grown_model(model: ModelConfig, stage: GrowthStage) -> ModelConfig:
    """The model after `stage`. Raises ConfigError where that adds nothing, takes away, or names layers it has not."""
    if model.layer != "tokenformer":
        raise ConfigError(f"a model of layer: {model.layer} has no parameter tokens to add to")
    insertions = sorted(stage.insert_layers)
    if insertions and insertions[-1] > model.num_layers:
        raise ConfigError(f"insert_layers names layer {insertions[-1]}, the model has {model.num_layers}")
    origin = layer_origins(model.num_layers, insertions)
    changes: dict[str, object] = {"num_layers": len(origin)}
    for kind in TOKEN_KINDS:
        old = model.token_counts(kind)
        kept = [old[layer] if layer is not None else _neighbour(old, origin, i) for i, layer in enumerate(origin)]
        new = _requested_counts(kind, kept, getattr(stage, f"{kind}_tokens"))
        for i, layer in enumerate(origin):
            if layer is not None and new[i] < old[layer]:
                raise ConfigError(
                    f"{kind}_tokens={new[i]}: there are {old[layer]} in layer {layer} already, and growth only adds; "
                    f"megatron-tf reshard-checkpoint --shrink takes away"
                )
            if layer is not None and new[i] > old[layer]:
                _check_init(model, stage, f"{kind}_tokens={new[i]}", old=old[layer], new=new[i])
        changes[f"{kind}_tokens"] = new[0] if len(set(new)) == 1 else new
    grown = dataclasses.replace(model, **changes)  # type: ignore[arg-type]
    if grown == model:
        raise ConfigError("the growth adds nothing: ask for more tokens of some kind, or for layers")
    return grown


def layer_origins(num_layers: int, insertions: list[int]) -> list[int | None]:
    """For each layer after the growth the old layer it was, None for a new one."""
    origin: list[int | None] = []
    for layer in range(num_layers + 1):
        origin += [None] * insertions.count(layer)
        if layer < num_layers:
            origin.append(layer)
    return origin


def parse_token_option(option: str, text: str) -> dict[str, LayerTokens]:
    """Kind -> tokens, from "qkv=N,proj=N,ffn@0-5=N": for all layers, or for the ones named after the @.

    Raises ConfigError naming the `option` where the text can't be read.
    """
    counts: dict[str, LayerTokens] = {}
    for part in text.split(","):
        place, _, number = (word.strip() for word in part.partition("="))
        kind, at, layers = place.partition("@")
        if kind not in TOKEN_KINDS:
            near = difflib.get_close_matches(kind, TOKEN_KINDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(TOKEN_KINDS)}"
            raise ConfigError(f"{option}: unknown kind {kind!r}; {hint}")
        if not number.isdecimal() or int(number) == 0:
            raise ConfigError(f"{option} {part.strip()}: write KIND=NUMBER, such as ffn=4096, or KIND@LAYERS=NUMBER")
        known = counts.get(kind)
        if known is not None and (isinstance(known, int) or not at or layers in known):
            raise ConfigError(f"{option}: {place} is given twice")
        counts[kind] = {**(known or {}), layers: int(number)} if at else int(number)
    return counts


def _check_init(model: ModelConfig, stage: GrowthStage, what: str, *, old: int, new: int) -> None:
    """Raise where the kind of growth can't keep the promise it makes."""
    is_softmax = model.norm_activation == "softmax"
    if stage.init == "zero_key" and is_softmax:
        raise ConfigError(
            f"{what}: a softmax model cannot be grown exactly by zero keys: each new token takes a share exp(0) = 1 of "
            f"every row's sum; init duplicate to a multiple of the {old} tokens is exact"
        )
    if stage.init == "duplicate" and new < 2 * old:
        raise ConfigError(
            f"{what}: duplicate makes as many copies of every one of the {old} tokens, so it needs {2 * old} or more; "
            f"use zero_key for fewer"
        )
    if stage.init == "duplicate" and is_softmax and new % old:
        raise ConfigError(
            f"{what}: a softmax model is duplicated exactly to a multiple of its {old} tokens only: "
            f"another token would take a share of every row's sum"
        )


def _neighbour(old: list[int], origin: list[int | None], place: int) -> int:
    """Tokens of the old layer that follows, or of the last one."""
    following = (layer for layer in origin[place:] if layer is not None)
    return old[next(following, len(old) - 1)]


def _requested_counts(kind: str, counts: list[int], requested: LayerTokens | None) -> list[int]:
    if requested is None:
        return counts
    if isinstance(requested, int):
        return [requested] * len(counts)
    new = list(counts)
    for layers, count in requested.items():
        first, _, last = layers.partition("-")
        try:
            chosen = range(int(first), int(last or first) + 1)
        except ValueError:
            raise ConfigError(f"{kind}_tokens: layers are written 3 or 0-5, not {layers!r}") from None
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < len(new):
            raise ConfigError(f"{kind}_tokens: there are no layers {layers} among {len(new)}")
        for layer in chosen:
            new[layer] = count
    return new
