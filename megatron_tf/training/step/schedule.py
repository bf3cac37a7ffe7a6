"""The learning rate as a function of the step, or of the tokens trained on."""

import math

from megatron_tf.config import ScheduleConfig


def learning_rate(
    config: ScheduleConfig, step: int, *, train_iters: int, tokens: int = 0, step_tokens: int = 1
) -> float:
    """Return the learning rate of step `step` (from 0): linear warmup from zero, decay to min_lr, then min_lr.

    All counts are from the start of the schedule. It ends after `train_iters` steps unless a key gives another end.
    With `lr_decay_tokens`, it is over the `tokens` trained on before the step, which adds `step_tokens`.
    """
    by_tokens = config.lr_decay_tokens is not None
    place, stride = (tokens, step_tokens) if by_tokens else (step, 1)
    end = config.lr_decay_tokens or config.lr_decay_iters or train_iters
    warmup = config.lr_warmup_tokens or config.lr_warmup_iters
    if config.lr_warmup_fraction is not None:
        warmup = round(config.lr_warmup_fraction * end)
    if place < warmup:
        return config.lr * min(1.0, (place + stride) / warmup)
    if config.lr_decay_style == "constant":
        return config.lr
    if place >= end:
        return config.min_lr
    start = warmup
    if config.lr_decay_style == "WSD":
        start = max(warmup, end - (config.lr_wsd_decay_tokens or config.lr_wsd_decay_iters or round(end / 10)))
    progress = min(1.0, max(0.0, (place - start) / max(1, end - start)))
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.lr_decay_style == "cosine" else 1.0 - progress
    return config.min_lr + (config.lr - config.min_lr) * share
