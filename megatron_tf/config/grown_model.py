"""The model configuration that a growth stage results in, and where its layers come from."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from megatron_tf.config.errors import ConfigError, message_of
from megatron_tf.config.growth import UNEVEN_MULTIPLE, GrowthStage, LayerTokens, TokenInit
from megatron_tf.config.model import ModelConfig


@dataclass(frozen=True)
class LayerSource:
    """Where a layer of a grown model comes from."""

    layer: int
    """The old layer that it is, or for a new layer the one that it copies, or whose number of tokens it takes."""
    is_new: bool = False


def grown_model(model: ModelConfig, stage: GrowthStage) -> ModelConfig:
    """Return the model after `stage`: width first, then layers and parameter tokens.

    Raises ConfigError if the stage adds nothing, removes tokens or layers, names layers that do not exist, or has
    options that the model or the growth has no use for.
    """
    _check_options(model, stage)
    wide = widened_model(model, stage.hidden_multiple)
    sources = layer_sources(wide.num_layers, stage)
    if stage.layer_init != "identity" and not any(source.is_new for source in sources):
        raise ConfigError(f"layer_init={stage.layer_init}: no layer is new; set num_layers or insert_layers")
    changes: dict[str, object] = {"num_layers": len(sources)}
    for kind in wide.token_kinds:
        changes[f"{kind}_tokens"] = _grown_counts(wide, stage, kind, sources=sources)
    grown = _changed(wide, **changes)
    if grown == model:
        raise ConfigError("the growth adds nothing: request more width, more tokens of some kind, or new layers")
    if grown == wide:
        _check_appends(stage)
    return grown


def keeps_outputs(model: ModelConfig, stage: GrowthStage) -> bool:
    """Return whether the outputs of `model` stay the same under `stage`, up to rounding.

    Raises ConfigError as `grown_model` does.
    """
    if stage.shrink_factor != 1 or stage.perturb_std:
        return False
    grown, sources = grown_model(model, stage), layer_sources(model.num_layers, stage)
    if stage.layer_init == "copy" and any(source.is_new for source in sources):
        return False
    if stage.init in ("auto", "zero_key", "rotated_key", "duplicate"):
        return True
    # the other inits change the outputs of a layer that grows; a new layer adds nothing, whatever its tokens are
    return all(source.is_new or old == new for source, old, new in _token_counts(model, grown, sources))


def token_init(model: ModelConfig, stage: GrowthStage) -> TokenInit:
    """Return how new tokens are initialized under `stage`: its `init`, or what `auto` stands for.

    Raises ConfigError as `grown_model` does.
    """
    if stage.init != "auto":
        return stage.init
    grown, sources = grown_model(model, stage), layer_sources(model.num_layers, stage)
    has_doubled = any(new >= 2 * old for _, old, new in _token_counts(model, grown, sources))
    return "rotated_key" if has_doubled and model.norm_activation == "l2_norm_gelu" else "zero_key"


def _token_counts(
    model: ModelConfig, grown: ModelConfig, sources: Sequence[LayerSource]
) -> Iterator[tuple[LayerSource, int, int]]:
    """Yield where each layer of the grown model comes from, and its old and new number of tokens of each kind."""
    for kind in model.token_kinds:
        old, new = model.token_counts(kind), grown.token_counts(kind)
        for source, count in zip(sources, new, strict=True):
            yield source, old[source.layer], count


def widened_model(model: ModelConfig, multiple: float | None) -> ModelConfig:
    """Return the model with `multiple` times the width and heads; None keeps them.

    Raises ConfigError if they are not integers then.
    """
    if multiple is None:
        return model
    if multiple == UNEVEN_MULTIPLE and (model.hidden_size % 2 or model.num_attention_heads % 2):
        raise ConfigError(
            f"hidden_multiple={multiple:g} needs an even hidden_size and an even num_attention_heads, and they are "
            f"{model.hidden_size} and {model.num_attention_heads}: use an integer"
        )
    if multiple == UNEVEN_MULTIPLE and model.norm == "rmsnorm":
        raise ConfigError(
            f"hidden_multiple={multiple:g} mixes channels, and the norms inside the blocks of norm: rmsnorm have a "
            f"weight for each channel: use an integer"
        )
    return _changed(
        model,
        hidden_size=int(model.hidden_size * multiple),
        num_attention_heads=int(model.num_attention_heads * multiple),
    )


def _changed(model: ModelConfig, **changes: object) -> ModelConfig:
    try:
        return dataclasses.replace(model, **changes)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(f"the grown model is not possible: {message_of(error.errors()[0])}") from None


def layer_sources(num_layers: int, stage: GrowthStage) -> list[LayerSource]:
    """Return the source of each layer after `stage` of a model of `num_layers`.

    Raises ConfigError for layers that do not exist, or if there are fewer layers than before.
    """
    if stage.num_layers is None:
        return _inserted(num_layers, sorted(stage.insert_layers))
    if stage.num_layers < num_layers:
        raise ConfigError(
            f"num_layers={stage.num_layers}: the model already has {num_layers}, and growth only adds layers; "
            f"use megatron-tf reshard-checkpoint --drop-layers to remove some"
        )
    seen: set[int] = set()
    sources = []
    for place in range(stage.num_layers):
        layer = _placed(place, num_layers, stage.num_layers, order=stage.layer_order)
        sources.append(LayerSource(layer, is_new=layer in seen))
        seen.add(layer)
    return sources


def _inserted(num_layers: int, insertions: list[int]) -> list[LayerSource]:
    if insertions and insertions[-1] > num_layers:
        raise ConfigError(f"insert_layers names layer {insertions[-1]}, but the model has {num_layers} layers")
    sources = []
    for layer in range(num_layers + 1):
        neighbor = min(layer, num_layers - 1)  # the layer after it, or the last one
        sources += [LayerSource(neighbor, is_new=True)] * insertions.count(layer)
        if layer < num_layers:
            sources.append(LayerSource(layer))
    return sources


def _placed(place: int, old: int, new: int, *, order: str) -> int:
    """Return the old layer at a place of the new stack; docs/growth.md states the formulas."""
    if order == "interleaved":
        return place * old // new
    if order == "stacked":
        return place % old
    # the block of middle layers, as long as the growth but without both ends, follows itself until the stack is full
    block = min(new - old, max(1, old - 2)) or 1
    start = (old - block) // 2
    end = old - start - block  # layers after the block
    if place < start:
        return place
    if place < new - end:
        return start + (place - start) % block
    return place - (new - old)


def _grown_counts(model: ModelConfig, stage: GrowthStage, kind: str, *, sources: list[LayerSource]) -> int | list[int]:
    old = model.token_counts(kind)
    new = _requested_counts(kind, [old[source.layer] for source in sources], getattr(stage, f"{kind}_tokens"))
    for count, source in zip(new, sources, strict=True):
        before = old[source.layer]
        if source.is_new and stage.layer_init == "identity":
            continue  # all of its rows are new
        if count < before and source.is_new:
            raise ConfigError(
                f"{kind}_tokens={count}: a new layer is a copy of layer {source.layer}, which has {before}; request at "
                f"least as many, or set layer_init: identity"
            )
        if count < before:
            raise ConfigError(
                f"{kind}_tokens={count}: layer {source.layer} already has {before}, and growth only adds tokens; "
                f"use megatron-tf reshard-checkpoint --shrink to remove some"
            )
        if count > before:
            _check_init(model, stage, f"{kind}_tokens={count}", old=before, new=count)
    return new[0] if len(set(new)) == 1 else new


def _check_options(model: ModelConfig, stage: GrowthStage) -> None:
    """Raise ConfigError for options of the other kind of layers."""
    if model.layer == "transformer":
        for kind in ("qkv", "proj"):
            if getattr(stage, f"{kind}_tokens") is not None:
                raise ConfigError(f"{kind}_tokens: a model with layer: transformer has none; its MLP has ffn_tokens")
        if stage.init not in ("auto", "zero_key"):
            raise ConfigError(f"init={stage.init} is for parameter tokens: with layer: transformer set mlp_init")
        if stage.mlp_init != "zero_key" and stage.ffn_tokens is None:
            raise ConfigError(f"mlp_init={stage.mlp_init}: no hidden unit is new; set ffn_tokens")
    elif stage.mlp_init != "zero_key":
        raise ConfigError(f"mlp_init={stage.mlp_init} is for layer: transformer: set init")


def _check_appends(stage: GrowthStage) -> None:
    """Raise ConfigError for options that distinguish old rows from new ones: more width appends no rows."""
    given = {
        "old_tokens_lr_scale": stage.old_tokens_lr_scale != 1.0,
        "new_tokens_lr_scale": stage.new_tokens_lr_scale != 1.0,
        "rewarmup=new": stage.rewarmup == "new",
        "adam_state=reset_new": stage.adam_state == "reset_new",
    }
    if keys := [key for key, is_given in given.items() if is_given]:
        raise ConfigError(
            f"{', '.join(keys)}: growth in width copies every row and appends none, so there are no new rows; remove "
            f"it, or add tokens or layers"
        )


def _check_init(model: ModelConfig, stage: GrowthStage, what: str, *, old: int, new: int) -> None:
    """Raise ConfigError if the stage's initialization can't keep the output as it promises."""
    init = stage.init if model.layer == "tokenformer" else stage.mlp_init
    is_softmax = model.layer == "tokenformer" and model.norm_activation == "softmax"
    if init in ("auto", "zero_key") and is_softmax:
        raise ConfigError(
            f"{what}: a softmax model cannot be grown exactly with zero keys, because each new token adds exp(0) = 1 "
            f"to the sum of every row; init duplicate to a multiple of the {old} tokens is exact"
        )
    if init in ("duplicate", "rotated_key") and new < 2 * old:
        raise ConfigError(
            f"{what}: {init} adds whole sets of copies or rotations of the {old} tokens, so it needs at least "
            f"{2 * old}; use zero_key for fewer"
        )
    if init == "rotated_key" and model.norm_activation != "l2_norm_gelu":
        raise ConfigError(
            f"{what}: rotated_key keeps the norm of a row of scores, and only norm_activation l2_norm_gelu divides by "
            f"it; use duplicate with {model.norm_activation}"
        )
    if init == "duplicate" and is_softmax and new % old:
        raise ConfigError(
            f"{what}: a softmax model can only be duplicated exactly to a multiple of its {old} tokens, because any "
            f"other token would add to the sum of every row"
        )


def _requested_counts(kind: str, counts: list[int], requested: LayerTokens | None) -> list[int]:
    if requested is None:
        return counts
    if isinstance(requested, int):
        return [requested] * len(counts)
    new, named = list(counts), set[int]()
    for layers, count in requested.items():
        first, _, last = layers.partition("-")
        try:
            chosen = range(int(first), int(last or first) + 1)
        except ValueError:
            raise ConfigError(f"{kind}_tokens: write layers as 3 or 0-5, not {layers!r}") from None
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < len(new):
            raise ConfigError(f"{kind}_tokens: layers {layers!r} are out of range: the last one is {len(new) - 1}")
        if again := sorted(named & {*chosen}):
            raise ConfigError(f"{kind}_tokens: layer {again[0]} is named twice, the second time in {layers!r}")
        named |= {*chosen}
        for layer in chosen:
            new[layer] = count
    return new
