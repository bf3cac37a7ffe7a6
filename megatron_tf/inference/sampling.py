"""Sampling of the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.errors import UserError

_MIN_TEMPERATURE = 1e-20
"""Below it sampling is greedy: apart from ties, all probabilities would be 0 or 1."""
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, from the golden ratio: seeds of samples are far apart, even in their lower half


def seed_of_sample(seed: int, number: int) -> int:
    """Return the seed of sample `number` (from 0) of one prompt: `seed` for the first, then different ones."""
    return seed if number == 0 else (seed + number * _SEED_STEP) % 2**63


@dataclass(frozen=True)
class Sampling:
    """Temperature and truncation. Raises UserError for values out of range."""

    temperature: float = 1.0
    """Divides the logits; 0, or a value so small that they would overflow, selects the most likely token."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Of those, sample from the smallest set of most likely tokens whose probabilities add up to at least this."""

    @property
    def is_greedy(self) -> bool:
        """Return whether the most likely token is always chosen."""
        return self.temperature < _MIN_TEMPERATURE

    @property
    def is_certain(self) -> bool:
        """Return whether every sample of a prompt is the same."""
        return self.is_greedy or self.top_k == 1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature ({self.temperature}) must be 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k ({self.top_k}) must be 0, for all, or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p ({self.top_p}) must be above 0 and at most 1")


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the candidate ids for logits [B, V] and their probabilities, each [B, K].

    Truncated ids have probability 0. The sampling must not be greedy.
    """
    scaled = logits.float() / sampling.temperature
    is_cut = sampling.top_k > 0 or sampling.top_p < 1
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if is_cut:
        scaled, ids = scaled.topk(count) if count < logits.shape[-1] else scaled.sort(descending=True)
    else:
        ids = torch.arange(count, device=logits.device).expand_as(logits)
    probabilities = torch.softmax(scaled, -1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        kept = before < sampling.top_p
        kept[..., 0] = True  # even a sum that is 0 in fp32 keeps the most likely
        probabilities = probabilities * kept
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return ids, probabilities


def sample_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """Sample an id for each row of logits [B, V] with `uniform` [B], float64 random numbers in [0, 1).

    Greedy sampling uses none. Non-finite logits give some id.
    """
    if sampling.is_greedy:
        return logits.max(-1).indices  # argmax takes five times as long in 16 bits on a CPU
    assert uniform is not None, "only greedy sampling needs no random numbers"
    ids, probabilities = candidates(logits, sampling)
    below = probabilities.double().cumsum(-1)
    # scaled by the last sum rather than 1: rounding must not select a token of probability 0
    index = torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)
    index = index.clamp(max=below.shape[-1] - 1)  # a sum that is NaN is found nowhere
    return ids.gather(-1, index)[:, 0]
