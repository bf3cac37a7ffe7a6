"""Log-likelihoods of texts under a model: continuations in batches by length, long texts in windows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_tf.errors import UserError
from megatron_tf.inference.model import LanguageModel
from megatron_tf.layers.cross_entropy import cross_entropy

_CPU_TOKENS, _GPU_TOKENS = 1 << 12, 1 << 14  # of a batch without a given size; on a CPU larger ones are slower


class Request(NamedTuple):
    """Ids whose last ones are to be scored, given those before them."""

    ids: Sequence[int]
    num_scored: int
    """Less than len(ids): the first id has nothing before it."""


class Score(NamedTuple):
    """Of the scored ids of one request."""

    log_likelihood: float
    """Sum, in nats."""
    is_greedy: bool
    """Whether each is the likeliest of the vocabulary, padding apart."""


@torch.no_grad()
def score(
    model: LanguageModel, requests: Sequence[Request], batch_size: int | None = None
) -> Iterator[tuple[int, Score]]:
    """Yield (index, score) of every request, the longest first; `batch_size` None suits it to the requests' lengths."""
    tokens = _CPU_TOKENS if next(model.parameters()).device.type == "cpu" else _GPU_TOKENS
    for batch in _batches(requests, batch_size, tokens):
        yield from zip(batch, _score_batch(model, [requests[i] for i in batch]), strict=True)


def rolling_windows(ids: Sequence[int], *, window: int, stride: int, first: int = 1) -> Iterator[Request]:
    """Yield requests that score ids[first:] once each, in turns of `stride`, given all that fits into `window` inputs.

    With stride == window and first == 1 these are lm-evaluation-harness's windows of context_len 1: the first id of a
    turn has but one id before it, and the last turn as many as fit. Raises UserError unless 1 <= stride <= window.
    """
    if not 1 <= stride <= window:
        raise UserError(f"windows of {window} tokens can't move by {stride}: choose from 1 to {window}")
    done = first
    while done < len(ids):
        stop = min(len(ids), done + (window if done == first else stride))
        yield Request(ids[max(0, stop - 1 - window) : stop], stop - done)
        done = stop


def _batches(requests: Sequence[Request], batch_size: int | None, tokens: int) -> Iterator[list[int]]:
    """Indices of requests, longest first: a batch pads little, and the first one shows whether memory suffices."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
    start = 0
    while start < len(order):
        size = batch_size or max(1, tokens // len(requests[order[start]].ids))
        yield order[start : start + size]
        start += size


def _score_batch(model: LanguageModel, requests: Sequence[Request]) -> Iterator[Score]:
    """Scores of requests in one call of the model, padded on the right, where causal attention does not see it."""
    device = next(model.parameters()).device
    ids = torch.zeros(len(requests), max(len(request.ids) for request in requests), dtype=torch.int64)
    for row, request in zip(ids, requests, strict=True):
        row[: len(request.ids)] = torch.as_tensor(request.ids, dtype=torch.int64)
    ids = ids.to(device)
    logits = model(ids[:, :-1])
    for row, row_logits, request in zip(ids, logits, requests, strict=True):
        stop = len(request.ids)
        targets = row[stop - request.num_scored : stop]
        chosen = row_logits[stop - 1 - request.num_scored : stop - 1]
        loss = cross_entropy(chosen, targets, None).double().sum()
        if loss.isnan():
            raise UserError("the model's logits are NaN: its checkpoint cannot be used")
        likeliest = chosen[:, : model.config.vocab_size].argmax(-1)
        yield Score(-float(loss), bool((likeliest == targets).all()))
