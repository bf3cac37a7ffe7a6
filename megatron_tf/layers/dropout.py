"""Dropout whose masks are a function of the seed, the sample and the position in the model, not of earlier draws.

A resumed run and a recomputed layer therefore draw the same masks, without any saved generator state.

| tensor | on each rank | mask |
|---|---|---|
| embedding, output of attention and ffn | [S, B, D], the same on every tensor-parallel rank | the same on every rank |
| the same under sequence parallelism | [s, B, D], part of the sequence | that part of the mask |
| attention weights | [B, h / R, S, S], some of the heads | those heads of the mask |

Masks depend neither on the layout nor on the device. The host never reads sample numbers, which stay on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_tf.kernels.documents import Documents
from megatron_tf.kernels.dropout import Drop, drop, nth_word
from megatron_tf.parallel.collectives import group_rank, group_size
from megatron_tf.tokenformer.dtypes import wide_dtype
from megatron_tf.tokenformer.initial_values import stream_seed

# of attention with dropout: more blocks save little, and smaller ones cost more to launch than to compute
_QUERY_BLOCKS = 8
_FEWEST_QUERIES = 128


@dataclass(frozen=True)
class Seeds:
    """Seeds of the masks of one micro-batch: one per row of elements, the same in all layers."""

    hidden: Tensor
    """int64 [s, B], of this rank's part of the sequence."""
    attention: Tensor | None
    """int64 [B, h / R, S], of each query of this rank's heads; None without attention dropout."""


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """The rates and mask seeds of one layer and one micro-batch."""

    hidden_rate: float
    attention_rate: float
    seed: int
    drop: Drop = drop
    seeds: Seeds | None = None
    """Seeds of the micro-batch, set by `of_samples`."""
    layer: int | None = None
    """Number of the layer; None for the embedding."""

    def of_samples(
        self, samples: Tensor, *, positions: Tensor, heads: int, group: ProcessGroup | None, sequence_parallel: bool
    ) -> Self:
        """Return the dropout for samples with these numbers in the data of the run, int64 [B] on the device.

        `positions`, int64 [S], are those in the sequence of the tokens that the tensor-parallel ranks of `group` share,
        and `heads` is the total number of heads. Attention dropout needs the whole sequence.
        """
        ranks, rank = group_size(group), group_rank(group)
        of_sample = nth_word(nth_word(torch.zeros_like(samples), self.seed), samples)
        part = positions.tensor_split(ranks)[rank] if sequence_parallel else positions
        attention = None
        if self.attention_rate:
            own_heads = torch.arange(heads, device=samples.device).tensor_split(ranks)[rank]
            of_head = nth_word(of_sample[:, None], own_heads)
            attention = nth_word(of_head[..., None], positions)
        return replace(self, seeds=Seeds(nth_word(of_sample, part[:, None]), attention))

    def hidden(self, x: Tensor, branch: str, residual: Tensor | None = None) -> Tensor:
        """Drop elements of x [s, B, D] and scale up the others, then add `residual` [s, B, D]."""
        if not self.hidden_rate:
            return x if residual is None else residual + x
        assert self.seeds is not None
        stream = stream_seed(self.seed, "hidden dropout", self.layer, branch)
        return self.drop(x, self.seeds.hidden, stream=stream, rate=self.hidden_rate, residual=residual)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, documents: Documents | None = None) -> Tensor:
        """Compute causal attention of q, k, v [S, B, h, d] with dropout of its weights -> [S, B, h, d].

        `documents` turns on intra-document masking. Queries are processed in blocks, each with the keys up to its
        last query: half the work of all pairs. Only the weights of one block [B, h, S / 8, S] are in memory at a time;
        backward recomputes them, unless the sequence is a single block.
        """
        assert self.seeds is not None
        assert self.seeds.attention is not None
        length = q.shape[0]
        size = max(_FEWEST_QUERIES, -(-length // _QUERY_BLOCKS))
        run: Callable[..., Tensor] = self._attend_block
        if size < length:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        blocks = []
        for first in range(0, length, size):
            stop = min(first + size, length)
            starts = None if documents is None else documents.starts[:, None, first:stop]
            seeds = self.seeds.attention[:, :, first:stop]
            blocks.append(run(q[first:stop], k[:stop], v[:stop], seeds=seeds, starts=starts))
        return torch.cat(blocks)

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor, *, seeds: Tensor, starts: Tensor | None) -> Tensor:
        """Attend from the last n queries [n, B, h, d] to all keys -> [n, B, h, d]; starts [B, 1, n] of documents.

        Computes in the accumulation type, as torch's attention does without a fused kernel.
        """
        wide = wide_dtype(q.dtype)
        qw, kw, vw = (t.permute(1, 2, 0, 3).to(wide) for t in (q, k, v))
        keys = torch.arange(len(k), device=q.device)
        hidden = keys > keys[-len(q) :, None]
        if starts is not None:
            hidden = hidden | (keys < starts[..., None])
        scores = qw @ (kw * q.shape[-1] ** -0.5).mT
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        stream = stream_seed(self.seed, "attention dropout", self.layer)
        weights = self.drop(weights, seeds, stream=stream, rate=self.attention_rate)
        return (weights @ vw).to(q.dtype).permute(2, 0, 1, 3)
