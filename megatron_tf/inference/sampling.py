"""Sampling of the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.errors import UserError

_LEAST_TEMPERATURE = 1e-20
"""Below it any difference of logits decides: what is not a tie has probability 1 or 0."""
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, and of no pattern: seeds of samples are far apart, in their lower half too


def seed_of_sample(seed: int, number: int) -> int:
    """The seed of sample `number`, from 0, of one prompt: `seed` itself for the first, and another for each other."""
    return seed if number == 0 else (seed + number * _SEED_STEP) % 2**63


@dataclass(frozen=True)
class Sampling:
    """Temperature and truncation. Raises UserError for values without a meaning."""

    temperature: float = 1.0
    """Logits are divided by it; 0, and what is so small that they would overflow, takes the likeliest token."""
    top_k: int = 0
    """Choose among this many likeliest; 0 for all."""
    top_p: float = 1.0
    """Of those, choose among the likeliest whose probabilities reach this sum, the one that reaches it included."""

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is certain."""
        return self.temperature < _LEAST_TEMPERATURE

    @property
    def is_certain(self) -> bool:
        """Whether every sample of a prompt is the same."""
        return self.is_greedy or self.top_k == 1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature ({self.temperature}) must be 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k ({self.top_k}) must be 0, for all, or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p ({self.top_p}) must be above 0 and at most 1")


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Logits [B, V] -> the ids that may be chosen and their probabilities, each [B, K].

    Those that are cut off have probability 0; the sampling must not be greedy.
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
        kept[..., 0] = True  # a sum that is 0 in fp32 keeps the likeliest too
        probabilities = probabilities * kept
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return ids, probabilities


def sample_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Choose an id for each row of logits [B, V] by numbers drawn uniformly from [0, 1): `uniform` [B], float64."""
    if sampling.is_greedy:
        return logits.argmax(-1)
    ids, probabilities = candidates(logits, sampling)
    below = probabilities.double().cumsum(-1)
    # of the last sum, not of 1: rounding must not reach a token of probability 0
    index = torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)
    return ids.gather(-1, index)[:, 0]
