"""Log-likelihoods of texts under a model: continuations in batches by length, long texts in windows."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tf.errors import UserError
from megatron_tf.inference.model import LanguageModel
from megatron_tf.layers.cross_entropy import token_losses

_CPU_TOKENS, _GPU_TOKENS = 1 << 12, 1 << 14  # per batch by default; on a CPU larger ones are slower
_LOGITS = 1 << 26  # computed at once: 256 MiB in fp32


class Request(NamedTuple):
    """Ids of which the last `num_scored` are scored, given those before them."""

    ids: Sequence[int]
    num_scored: int
    """Less than len(ids), since the first id has no context."""
    counts: Sequence[bool] | None = None
    """Which of the scored ids the log-likelihood is of; None: all."""


class Score(NamedTuple):
    """The score of one request."""

    log_likelihood: float
    """Sum over the scored ids that count, in nats."""
    is_greedy: bool
    """Whether each scored id is the most likely of the vocabulary, without padding."""


@torch.no_grad()
def score(
    model: LanguageModel, requests: Sequence[Request], batch_size: int | None = None
) -> Iterator[tuple[int, Score]]:
    """Yield (index, score) of every request, longest first; a `batch_size` of None adapts it to their lengths."""
    tokens = _CPU_TOKENS if next(model.parameters()).device.type == "cpu" else _GPU_TOKENS
    for batch in _batches(requests, batch_size, tokens):
        yield from zip(batch, _score_batch(model, [requests[i] for i in batch]), strict=True)


def rolling_windows(
    ids: Sequence[int], *, window: int, stride: int, first: int = 1, counts: Sequence[bool] | None = None
) -> Iterator[Request]:
    """Yield requests that score each of ids[first:] once, `stride` at a time, given all that fits into `window` inputs.

    `counts` says of each of `ids` whether it counts.

    With stride == window and first == 1, these are lm-evaluation-harness's windows of context_len 1: the first id of a
    window has a context of one id, and the last window has as much as fits. Raises UserError unless
    1 <= stride <= window.
    """
    if not 1 <= stride <= window:
        raise UserError(f"windows of {window} tokens can't move by {stride}: choose from 1 to {window}")
    done = first
    while done < len(ids):
        stop = min(len(ids), done + (window if done == first else stride))
        yield Request(ids[max(0, stop - 1 - window) : stop], stop - done, None if counts is None else counts[done:stop])
        done = stop


def _batches(requests: Sequence[Request], batch_size: int | None, tokens: int) -> Iterator[list[int]]:
    """Yield batches of request indices, longest first: little padding, and the first one needs most memory."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
    start = 0
    while start < len(order):
        size = batch_size or max(1, tokens // len(requests[order[start]].ids))
        yield order[start : start + size]
        start += size


def _score_batch(model: LanguageModel, requests: Sequence[Request]) -> Iterator[Score]:
    """Score requests in one call of the model, padded on the right, where causal attention ignores it."""
    device = next(model.parameters()).device
    ids = torch.zeros(len(requests), max(len(request.ids) for request in requests), dtype=torch.int64)
    for row, request in zip(ids, requests, strict=True):
        row[: len(request.ids)] = torch.as_tensor(request.ids, dtype=torch.int64)
    ids = ids.to(device)
    hidden = model.hidden_states(ids[:, :-1])
    spans = [slice(len(request.ids) - request.num_scored, len(request.ids)) for request in requests]
    # the head is the most expensive layer: it is applied only to scored positions, a limited number at once
    scored = torch.cat([states[span.start - 1 : span.stop - 1] for states, span in zip(hidden, spans, strict=True)])
    targets = torch.cat([row[span] for row, span in zip(ids, spans, strict=True)])
    losses, is_likeliest = _score_rows(model, scored, targets)
    sizes = [request.num_scored for request in requests]
    for request, loss, greedy in zip(requests, losses.split(sizes), is_likeliest.split(sizes), strict=True):
        total = float((loss if request.counts is None else loss[torch.tensor(request.counts)]).sum())
        if math.isnan(total):
            raise UserError("the model's logits are NaN: its checkpoint cannot be used")
        yield Score(-total, bool(greedy.all()))


def _score_rows(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fp64 loss [K] of each target [K] after hidden states [K, D], and whether it is the most likely id."""
    losses, is_likeliest = [], []
    step = max(1, _LOGITS // model.config.padded_vocab_size)
    for states, wanted in zip(hidden.split(step), targets.split(step), strict=True):
        logits = model.logits(states[None])[0]
        losses.append(token_losses(logits, wanted).double())
        is_likeliest.append(logits[:, : model.config.vocab_size].argmax(-1) == wanted)
    return torch.cat(losses), torch.cat(is_likeliest)
