"""The `optimizer` and `loss_scale` sections of a configuration: AdamW, its schedule, and fp16 loss scaling."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.types import STRICT, Count, NonNegative, Number, ParameterKind


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LossScaleConfig:
    """Loss scaling under training.precision fp16, so that small gradients do not underflow."""

    loss_scale: Annotated[Number, Field(gt=0)] | None = None
    """Constant loss scale; by default the scale is dynamic and controlled by the other keys."""
    initial_loss_scale: Annotated[Number, Field(gt=0)] = 2.0**32
    """Initial dynamic loss scale."""
    min_loss_scale: Annotated[Number, Field(gt=0)] = 1.0
    """Minimum dynamic loss scale; an overflow at this scale counts as a batch with a non-finite gradient."""
    loss_scale_window: Count = 1000
    """Consecutive steps without overflow after which the scale is doubled."""
    hysteresis: Count = 2
    """Overflows to tolerate before the scale is halved. After that each overflow halves it, until it is doubled
    again."""

    def __post_init__(self) -> None:
        if self.initial_loss_scale < self.min_loss_scale:
            raise ConfigError(
                f"initial_loss_scale ({self.initial_loss_scale}) is below min_loss_scale ({self.min_loss_scale})"
            )


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ScheduleConfig:
    """The learning rate over a run, or from a growth stage on."""

    lr: Annotated[Number, Field(gt=0)]
    """Peak learning rate."""
    min_lr: Annotated[Number, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay from lr to min_lr. WSD (warm-up, stable, decay) stays at lr and only decays at the end."""
    lr_decay_iters: Count | None = None
    """Step at which min_lr is reached; by default train_iters."""
    lr_warmup_iters: NonNegative = 0
    """Steps of linear warm-up from zero."""
    lr_warmup_fraction: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """Linear warm-up as a fraction of lr_decay_iters or lr_decay_tokens; an alternative to lr_warmup_iters."""
    lr_wsd_decay_iters: Count | None = None
    """Steps of linear decay at the end of WSD; by default a tenth of lr_decay_iters or lr_decay_tokens."""
    lr_decay_tokens: Count | None = None
    """Number of trained tokens at which min_lr is reached; makes the schedule count tokens instead of steps."""
    lr_warmup_tokens: NonNegative = 0
    """Tokens of linear warm-up from zero."""
    lr_wsd_decay_tokens: Count | None = None
    """Tokens of linear decay at the end of WSD."""

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr ({self.min_lr}) is above lr ({self.lr})")
        by_steps = self._given("iters")
        by_tokens = self._given("tokens")
        if by_tokens and (by_steps or self.lr_decay_tokens is None):
            raise ConfigError(
                f"a schedule in tokens needs lr_decay_tokens and no key in steps, got {by_tokens + by_steps}"
            )
        if self.lr_warmup_fraction is not None and (self.lr_warmup_iters or self.lr_warmup_tokens):
            raise ConfigError("warm-up is given twice, as lr_warmup_fraction and in steps or tokens: give one")
        decay = self.lr_wsd_decay_iters or self.lr_wsd_decay_tokens
        if decay is not None and self.lr_decay_style != "WSD":
            raise ConfigError(
                f"lr_wsd_decay_iters and _tokens need lr_decay_style: WSD, but it is {self.lr_decay_style}"
            )
        for unit in ("iters", "tokens"):
            if (end := getattr(self, f"lr_decay_{unit}")) is not None:
                self.check_end(unit, f"lr_decay_{unit}", end)

    def _given(self, unit: str) -> list[str]:
        """Return the schedule keys in `unit` ("iters" or "tokens") that have a value."""
        keys = (f"lr_decay_{unit}", f"lr_warmup_{unit}", f"lr_wsd_decay_{unit}")
        return [key for key in keys if getattr(self, key)]

    def check_end(self, unit: str, key: str, end: int) -> None:
        """Raise ConfigError if warm-up or decay is longer than the schedule, which ends at the value `end` of `key`."""
        if self.lr_decay_style == "constant":
            return
        for part in (f"lr_warmup_{unit}", f"lr_wsd_decay_{unit}"):
            length = getattr(self, part) or 0
            if length > end:
                raise ConfigError(f"{part} ({length}) is longer than the whole schedule, which ends at {key} ({end})")

    @property
    def has_warmup(self) -> bool:
        """Return whether the schedule has a warm-up."""
        return bool(self.lr_warmup_iters or self.lr_warmup_fraction or self.lr_warmup_tokens)

    @property
    def needs_end(self) -> bool:
        """Return whether the learning rate depends on an end of the schedule that no key gives."""
        has_end = self.lr_decay_iters is not None or self.lr_decay_tokens is not None
        is_level = self.lr_decay_style == "constant" and not self.lr_warmup_fraction
        return not (has_end or is_level)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OptimizerConfig(ScheduleConfig):
    """AdamW and the learning-rate schedule."""

    weight_decay: Annotated[Number, Field(ge=0)] = 0.1
    """Decoupled weight decay of every parameter except those of norms."""
    weight_decay_by_kind: dict[ParameterKind, Annotated[Number, Field(ge=0)]] = Field(default_factory=dict)
    """Override weight_decay for some kinds of parameters (embedding, qkv, proj, ffn, norm, final_norm, head), for
    example {embedding: 0.0}."""
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    """Decay rate of Adam's second moment."""
    adam_eps: Annotated[Number, Field(gt=0)] = 1e-8
    """Term added to the square root of Adam's second moment for numerical stability."""
    clip_grad: Annotated[Number, Field(ge=0)] = 1.0
    """Clip gradients to this global norm; 0 disables clipping."""

    def with_schedule(self, schedule: ScheduleConfig) -> "OptimizerConfig":
        """Return a copy with every key of `schedule`, and the other keys of this section."""
        keys = {key.name: getattr(schedule, key.name) for key in dataclasses.fields(ScheduleConfig)}
        return dataclasses.replace(self, **keys)
