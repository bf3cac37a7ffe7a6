"""The optimizer's sections of a configuration: AdamW with its schedule, and the scale of the loss."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.types import STRICT, Count, NonNegative, Number, ParameterKind


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LossScaleConfig:
    """Scaling of the loss under training.precision fp16, so that small gradients do not vanish."""

    loss_scale: Annotated[Number, Field(gt=0)] | None = None
    """A constant; by default the scale is dynamic, and the other keys say how."""
    initial_loss_scale: Annotated[Number, Field(gt=0)] = 2.0**32
    """Scale of the first step."""
    min_loss_scale: Annotated[Number, Field(gt=0)] = 1.0
    """Lowest scale: overflows there count as non-finite batches."""
    loss_scale_window: Count = 1000
    """Steps in a row without overflow after which the scale is doubled."""
    hysteresis: Count = 2
    """Overflows before the scale is halved; from then on each one halves it, until it is doubled."""

    def __post_init__(self) -> None:
        if self.initial_loss_scale < self.min_loss_scale:
            raise ConfigError(
                f"initial_loss_scale ({self.initial_loss_scale}) is below min_loss_scale ({self.min_loss_scale})"
            )


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: Annotated[Number, Field(gt=0)]
    """Highest learning rate."""
    min_lr: Annotated[Number, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay from lr to min_lr; WSD (warm up, stable, decay) stays at lr and decays at the end."""
    lr_decay_iters: Count | None = None
    """Step at which min_lr is reached; by default train_iters."""
    lr_warmup_iters: NonNegative = 0
    """Steps of linear warm-up from zero."""
    lr_warmup_fraction: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """The same as a share of lr_decay_iters or lr_decay_tokens."""
    lr_wsd_decay_iters: Count | None = None
    """Steps of linear decay at the end of WSD; by default a tenth of lr_decay_iters or lr_decay_tokens."""
    lr_decay_tokens: Count | None = None
    """Tokens trained on when min_lr is reached: the schedule then goes by tokens instead of steps."""
    lr_warmup_tokens: NonNegative = 0
    """Tokens of linear warm-up from zero."""
    lr_wsd_decay_tokens: Count | None = None
    """Tokens of linear decay at the end of WSD."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1
    """Decoupled decay of every parameter but those of the final norm."""
    weight_decay_by_kind: dict[ParameterKind, Annotated[Number, Field(ge=0)]] = Field(default_factory=dict)
    """Another decay for some kinds of parameters (embedding, qkv, proj, ffn, final_norm, head): {embedding: 0.0}."""
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    adam_eps: Annotated[Number, Field(gt=0)] = 1e-8
    """Term added to the root of the second moment."""
    clip_grad: Annotated[Number, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr ({self.min_lr}) is above lr ({self.lr})")
        by_steps = self._given("iters")
        by_tokens = self._given("tokens")
        if by_tokens and (by_steps or self.lr_decay_tokens is None):
            raise ConfigError(
                f"a schedule by tokens needs lr_decay_tokens and no key by steps: given are {by_tokens + by_steps}"
            )
        if self.lr_warmup_fraction is not None and (self.lr_warmup_iters or self.lr_warmup_tokens):
            raise ConfigError("a warm-up is given twice: as lr_warmup_fraction, and in steps or tokens; give one")
        decay = self.lr_wsd_decay_iters or self.lr_wsd_decay_tokens
        if decay is not None and self.lr_decay_style != "WSD":
            raise ConfigError(
                f"lr_wsd_decay_iters and _tokens are for lr_decay_style: WSD, it is {self.lr_decay_style}"
            )
        for unit in ("iters", "tokens"):
            if (end := getattr(self, f"lr_decay_{unit}")) is not None:
                self.check_end(unit, f"lr_decay_{unit}", end)

    def _given(self, unit: str) -> list[str]:
        """Keys of the schedule in a unit that have a value."""
        keys = (f"lr_decay_{unit}", f"lr_warmup_{unit}", f"lr_wsd_decay_{unit}")
        return [key for key in keys if getattr(self, key)]

    def check_end(self, unit: str, key: str, end: int) -> None:
        """Raise ConfigError where a part of the schedule is longer than the whole, which ends after `end`, by `key`."""
        if self.lr_decay_style == "constant":
            return
        for part in (f"lr_warmup_{unit}", f"lr_wsd_decay_{unit}"):
            length = getattr(self, part) or 0
            if length > end:
                raise ConfigError(f"{part} ({length}) is longer than the schedule, which ends at {key} ({end})")
