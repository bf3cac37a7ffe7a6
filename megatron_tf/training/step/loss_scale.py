"""Dynamic loss scaling for fp16 (arXiv 1710.03740), as Megatron-LM does it."""

from megatron_tf.checkpoint.run_state import LossScale
from megatron_tf.config import LossScaleConfig


class LossScaler:
    """The scale by which the loss is multiplied before backward and gradients are divided afterwards.

    Non-finite gradients halve the scale once there have been `hysteresis` of them since it last doubled; it doubles
    after `loss_scale_window` steps without any. Every rank sees the same gradient norm, so all ranks agree.
    """

    def __init__(self, config: LossScaleConfig, is_fp16: bool) -> None:
        self.config = config
        self.is_fp16 = is_fp16
        self.is_dynamic = is_fp16 and config.loss_scale is None
        self.scale = (config.loss_scale or config.initial_loss_scale) if is_fp16 else 1.0
        self.growth_tracker = 0
        self.hysteresis_tracker = config.hysteresis

    def update(self, is_finite: bool) -> bool:
        """Adapt the scale to a step; return whether its gradients overflowed at a scale that could be lowered."""
        if not self.is_dynamic:
            return False
        if is_finite:
            self.growth_tracker += 1
            if self.growth_tracker == self.config.loss_scale_window:
                self.growth_tracker, self.hysteresis_tracker = 0, self.config.hysteresis
                self.scale *= 2.0
            return False
        is_overflow = self.scale > self.config.min_loss_scale
        self.growth_tracker = 0
        self.hysteresis_tracker -= 1
        if self.hysteresis_tracker <= 0:
            self.scale = max(self.scale / 2.0, self.config.min_loss_scale)
        return is_overflow

    def state(self) -> LossScale | None:
        """Return the state to save in a checkpoint; None if the scale is constant."""
        if not self.is_dynamic:
            return None
        return LossScale(self.scale, self.growth_tracker, self.hysteresis_tracker)

    def load(self, state: LossScale | None) -> None:
        """Restore the state of a checkpoint; without one, keep the configured initial scale."""
        if self.is_dynamic and state is not None:
            self.scale = state.scale
            self.growth_tracker = state.growth_tracker
            self.hysteresis_tracker = state.hysteresis_tracker
