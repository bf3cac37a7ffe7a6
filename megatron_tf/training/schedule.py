"""Learning rate as a function of the step."""

import math

from megatron_tf.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, train_iters: int) -> float:
    """Rate of step `step` (the first is 0): linear warm-up from zero, then decay to min_lr, then min_lr."""
    if step < config.lr_warmup_iters:
        return config.lr * (step + 1) / config.lr_warmup_iters
    if config.lr_decay_style == "constant":
        return config.lr
    decay_steps = (config.lr_decay_iters or train_iters) - config.lr_warmup_iters
    progress = min(1.0, (step - config.lr_warmup_iters) / max(1, decay_steps))
    share = 1.0 - progress if config.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share


def rewarmup(step: int, growth_step: int, rewarmup_iters: int) -> float:
    """Share of the learning rate at `step` after a growth at `growth_step`: linear from zero over `rewarmup_iters`."""
    return min(1.0, (step - growth_step + 1) / rewarmup_iters) if rewarmup_iters else 1.0
