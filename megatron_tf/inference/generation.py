"""Sampling text with a key-value cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.inference.model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ValueError for values without a meaning."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Choose among this many likeliest; 0 for all."""
    top_p: float = 1.0
    """Choose among the likeliest whose probabilities reach this sum."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature and top-k must not be negative, and top-p must lie in (0, 1]")


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    eod: int,
    generator: torch.Generator,
) -> Iterator[int]:
    """Ids that follow the prompt's [S], one at a time, up to the end of the document. Padded ids never come."""
    caches = model.new_caches()
    ids = prompt[None]
    for _ in range(max_new_tokens):
        logits = model(ids, caches)[0, -1, : model.config.vocab_size]
        token = choose(logits, sampling, generator)
        if token == eod:
            return
        yield token
        ids = torch.tensor([[token]], device=prompt.device)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits.float() / sampling.temperature, -1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = before < sampling.top_p
    if sampling.top_k:
        kept[sampling.top_k :] = False
    return int(ids[torch.multinomial(probabilities * kept, 1, generator=generator)])
