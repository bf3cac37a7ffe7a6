"""Growth stages of a model, as they are configured; `grown_model` is the model that a stage results in."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.model import TOKEN_KINDS
from megatron_tf.config.moment import Moment
from megatron_tf.config.optimizer import ScheduleConfig
from megatron_tf.config.types import STRICT, Count, NonNegative, Number, NumLayers, Prefix, Size


def _named_layers(value: Any) -> Any:
    """Turn the number of a layer, which YAML reads as an integer, into its name."""
    if not isinstance(value, dict):
        return value
    return {str(key) if type(key) is int else key: count for key, count in value.items()}


LayerTokens = Size | Annotated[dict[str, Size], BeforeValidator(_named_layers)]
TokenInit = Literal["zero_key", "rotated_key", "zero_value", "duplicate", "duplicate_by_utility", "random"]
"""How new parameter tokens are initialized."""
LAYOUT_KEYS = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "pipeline_model_parallel_layout")
"""Keys of a stage that replace those of `parallel`."""
UNEVEN_MULTIPLE = 1.5
"""The only multiple of the width that is not an integer."""


_LARGEST_LR_SCALE = 1_000_000  # the product with a learning rate fits into fp32


def _check_multiple(value: float) -> float:
    if value != UNEVEN_MULTIPLE and (value < 2 or value != int(value)):
        raise ConfigError(f"must be an integer above 1, or {UNEVEN_MULTIPLE}: no other factor is exact, got {value:g}")
    return value


HiddenMultiple = Annotated[Number, Field(lt=2**31), AfterValidator(_check_multiple)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GrowthStage(Moment):
    """One growth of the model: more width, parameter tokens or layers, and how training continues afterwards."""

    qkv_tokens: LayerTokens | None = None
    """New number of parameter tokens of each query, key and value Pattention. A mapping sets it for some layers only,
    numbered as after the growth: {"0-5": 384, "7": 512}."""
    proj_tokens: LayerTokens | None = None
    """New number of parameter tokens of the attention output Pattention."""
    ffn_tokens: LayerTokens | None = None
    """New number of parameter tokens of the feed-forward Pattention, or of hidden units with layer: transformer."""
    insert_layers: list[NonNegative] = Field(default_factory=list)
    """Insert a new layer before each of these layers, of which it is a copy or neighbor; num_layers appends one at the
    end."""
    num_layers: NumLayers | None = None
    """New number of layers, placed by layer_order; an alternative to insert_layers."""
    layer_order: Literal["interleaved", "stacked", "middle"] = "interleaved"
    """Which of the L old layers is at place i of L'. interleaved: floor(i L / L'), each layer next to its copies.
    stacked: i mod L, the whole stack repeated. middle: the middle layers repeated. The first copy is the old layer."""
    layer_init: Literal["identity", "copy_zero", "copy"] = "identity"
    """How new layers are initialized. identity: as in a new model, with zero values where a branch ends. copy_zero: as
    a copy of the old layer with such zeros; both keep the output. copy: as a full copy with its Adam moments, which
    changes the output."""
    hidden_multiple: HiddenMultiple | None = None
    """Multiply hidden_size and num_attention_heads by an integer or by 1.5, keeping the output."""
    init: Literal["auto"] | TokenInit = "auto"
    """How new tokens are initialized. auto: as rotated_key with norm_activation l2_norm_gelu if a module gets at least
    twice its tokens, otherwise as zero_key; both keep the output. zero_key: with zero keys. rotated_key: with rotations
    of the old keys and zero values, and zero keys for any remainder. duplicate: as equal copies of the old tokens, with
    zero keys for any remainder, which keeps the output too. zero_value: with keys as in a new model and zero values,
    which changes the output a little. duplicate_by_utility: as copies of the tokens that contribute most on
    utility_data, which changes the output. random: as in the official code, which changes the output.
    docs/growth_study.md compares them."""
    utility_data: Prefix | None = None
    """Dataset (.bin/.idx) on which duplicate_by_utility measures contributions."""
    noise: Annotated[Number, Field(ge=0)] = 0.1
    """Standard deviation of the noise added to copies, relative to that of newly initialized rows. It sums to zero over
    the copies, so that the output stays the same, and lets them diverge."""
    mlp_init: Literal["zero_key", "zero_value", "duplicate"] = "zero_key"
    """How new hidden units are initialized with layer: transformer; each keeps the output. zero_key: with a zero row in
    the up projection. zero_value: with a zero row in the down projection. duplicate: as equal copies of the old
    units. In docs/growth_study.md such growth took 1.3 times the FLOPs of training from scratch."""
    shrink_factor: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Multiply the old rows of every parameter with weight decay by this after the growth (shrink and perturb). In
    docs/growth_study.md 0.5 with perturb_std 0.01 ended 0.04 nats higher than without."""
    perturb_std: Annotated[Number, Field(ge=0)] = 0.0
    """Add noise of this standard deviation to the same rows after the growth."""
    adam_state: Annotated[
        Literal["keep", "reset", "reset_new", "reset_second"],
        Field(validation_alias=AliasChoices("adam_state", "moments")),
    ] = "keep"
    """keep: copies inherit the Adam moments of their originals and other new rows start with zeros. reset: all moments
    restart from zero. reset_new: those of all new rows do. reset_second: all second moments do."""
    step_scale: Literal["preserve", "none"] = "preserve"
    """preserve: scale the Adam updates of copies so that growing commutes with an optimizer step. none: do not."""
    old_tokens_lr_scale: Annotated[Number, Field(ge=0, le=_LARGEST_LR_SCALE)] = 1.0
    """Learning rate of the old parameter tokens relative to the schedule; 0 freezes them, weight decay included."""
    new_tokens_lr_scale: Annotated[Number, Field(gt=0, le=_LARGEST_LR_SCALE)] = 1.0
    """Learning rate of the new parameter tokens relative to the schedule."""
    rewarmup_iters: NonNegative = 0
    """Steps of linear learning-rate warm-up after the growth."""
    optimizer: ScheduleConfig | None = None
    """A learning-rate schedule that replaces the current one and counts from the growth: lr, min_lr and the lr_ keys of
    the optimizer section. By default the schedule in force continues."""
    rewarmup: Literal["all", "new"] = "all"
    """Whether rewarmup_iters applies to all parameters, or to the new rows only."""
    tensor_model_parallel_size: Count | None = None
    """New tensor-parallel size from this growth on: the job saves and exits with code 75, and must be resubmitted with
    enough ranks."""
    pipeline_model_parallel_size: Count | None = None
    """New pipeline-parallel size from this growth on; it works as tensor_model_parallel_size does."""
    pipeline_model_parallel_layout: Annotated[list[Count], Field(min_length=1)] | None = None
    """Number of layers of each pipeline stage from this growth on; needed if `parallel` gives it and the number of
    layers or stages changes."""

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.insert_layers:
            raise ConfigError("num_layers and insert_layers both place new layers: give one of them")
        if self.num_layers is None and self.layer_order != "interleaved":
            raise ConfigError(
                f"layer_order={self.layer_order} places the layers of num_layers, which is not given: set num_layers, "
                f"or name each place in insert_layers and remove layer_order"
            )
        if (self.init == "duplicate_by_utility") != (self.utility_data is not None):
            raise ConfigError(
                "init: duplicate_by_utility and utility_data belong together: the prefix of the dataset on which the "
                "contribution of each token is measured"
            )
        if self.optimizer is not None and self.rewarmup_iters and self.optimizer.has_warmup:
            raise ConfigError("warm-up is given twice, as rewarmup_iters and in optimizer: give one")


def parse_token_option(option: str, text: str) -> dict[str, LayerTokens]:
    """Parse "qkv=N,proj=N,ffn@0-5=N" into kind -> tokens, for all layers or for those named after the @.

    Raises ConfigError naming the `option` if the text is malformed.
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
