"""Messages of a Pattention between tensor-parallel ranks, in chunks of tokens that travel while others are computed.

Inside, each rank has the whole input and output [G, T, W] of T tokens. Outside, it has what `dim` says:

| `dim` | outside         | on the way in | on the way out |
|-------|-----------------|---------------|----------------|
| None  | the whole       | -             | all-reduce     |
| -2    | [G, T / R, W]   | all-gather    | reduce-scatter |
| -1    | [G, T, W / R]   | all-gather    | reduce-scatter |

Inside, tokens are in the order of their chunks, so that a chunk is a range of rows for the products as well as for the
messages: chunk c has the c-th part of the tokens of rank 0, then those of rank 1, and so on. If no rank has a part of
the tokens (no -2), or with a single chunk, that is the order of the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.parallel.collectives import (
    Pending,
    group_size,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)

Dim = Literal[-2, -1]


def rows_of(x: Tensor, rows: slice) -> Tensor:
    """Return these rows of x [G, T, W]; x itself for all of them, as a view takes as long as launching a kernel."""
    return x if rows == slice(0, x.shape[1]) else x[:, rows]


@dataclass(frozen=True)
class TensorRanks:
    """The tensor-parallel ranks of a Pattention, and what each of them has of its input and of its output."""

    group: ProcessGroup | None = None
    gather_dim: Dim | None = None
    """Dimension of the input [..., T, D] of which a rank has a part, which is gathered; None: it has the whole."""
    scatter_dim: Dim | None = None
    """Dimension of the output [..., T, E] of which a rank receives a part of the sum; None: the whole."""
    saves_whole: bool = False
    """Whether the input, once gathered, is saved for backward, which otherwise gathers it again."""

    def output_shape(self, shape: Sequence[int]) -> list[int]:
        """Return the shape [..., T] of the output's tokens on this rank, given that of the input's."""
        first, *rest = shape
        ranks = group_size(self.group)
        first *= ranks if self.gather_dim == -2 else 1
        return [first // ranks if self.scatter_dim == -2 else first, *rest]

    def ports(self, part: Tensor, chunks: int) -> tuple[Port, Port]:
        """Return the ways in and out for this rank's part of the input [T or T / R, D]."""
        if self.group is None:
            whole = Port(None, None, TokenOrder(1, len(part), 1))
            return whole, whole
        parts = self.group.size() if -2 in (self.gather_dim, self.scatter_dim) else 1
        tokens = len(part) if self.gather_dim == -2 else len(part) // parts
        order = TokenOrder(parts, tokens, chunks)
        return Port(self.group, self.gather_dim, order), Port(self.group, self.scatter_dim, order)


@dataclass(frozen=True)
class Chunk:
    """A chunk of the tokens."""

    part: slice
    """Its tokens in each of the parts of the sequence."""
    rows: slice
    """Its tokens inside."""


@dataclass(frozen=True)
class TokenOrder:
    """The order of tokens inside: of `parts` equal parts of the sequence, `tokens` each, in at most `count` chunks."""

    parts: int
    tokens: int
    count: int

    @property
    def num_tokens(self) -> int:
        """Return T."""
        return self.parts * self.tokens

    def chunks(self) -> list[Chunk]:
        """Return the chunks, of sizes that differ by at most one token of each part."""
        count = max(1, min(self.count, self.tokens))
        bounds = [self.tokens * i // count for i in range(count + 1)]
        return [
            Chunk(slice(start, stop), slice(self.parts * start, self.parts * stop))
            for start, stop in itertools.pairwise(bounds)
        ]

    def pick(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return a chunk of x [G, T, W], which is in the order of the sequence, as a view [G, parts, tokens, W]."""
        return x.unflatten(1, (self.parts, self.tokens))[:, :, chunk.part]


@dataclass(frozen=True)
class Chunked:
    """A tensor whose chunks are on their way."""

    tensor: Tensor
    """[G, T, W], or a part of it; must not be read before its chunks have arrived."""
    arrivals: Sequence[tuple[slice, Pending]]
    """Rows of each chunk, and its message."""

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Wait for one chunk after the other, and yield its rows inside and the tensor at these rows."""
        for rows, pending in self.arrivals:
            pending.wait()
            yield rows, rows_of(self.tensor, rows)

    def wait(self) -> Tensor:
        """Wait for all chunks and return the tensor."""
        for _, pending in self.arrivals:
            pending.wait()
        return self.tensor


@dataclass(frozen=True)
class Port:
    """The way in or out of a Pattention: the messages by which a tensor gets there."""

    group: ProcessGroup | None
    dim: Dim | None
    order: TokenOrder

    def gather(self, part: Tensor, *, waits: bool) -> Chunked:
        """Start to gather [G, T, W] from the ranks' parts; with `waits`, the first chunk is there on return.

        `waits` is for those who need that chunk at once; all messages but those that are waited for are asynchronous.
        """
        if self.dim is None:
            return Chunked(part, [(slice(0, part.shape[1]), Pending(None, part))])
        chunks = self.order.chunks()
        shape = list(part.shape)
        shape[self.dim] *= group_size(self.group)
        whole = part.new_empty(shape)
        arrivals = []
        for chunk in chunks:
            mine = part[:, chunk.part] if self.dim == -2 else self.order.pick(part, chunk).flatten(1, 2)
            is_awaited = waits and chunk is chunks[0]
            pending = start_all_gather(
                mine, self.dim, self.group, out=whole[:, chunk.rows], is_asynchronous=not is_awaited
            )
            arrivals.append((chunk.rows, pending))
        return Chunked(whole, arrivals)

    def reduce(
        self, compute: Callable[[slice, Tensor], None], whole: tuple[int, int], like: Tensor, *, waits: bool
    ) -> Chunked:
        """Start to sum [G, T, W] over the ranks, whose part of the sum is returned; `whole` is (G, W).

        `compute(rows, out)` writes this rank's addend of some rows. With `waits`, the last chunk is there on return.
        """
        chunks = self.order.chunks()
        (groups, width), ranks = whole, group_size(self.group)
        tokens = self.order.tokens if self.dim == -2 else self.order.num_tokens
        result = like.new_empty(groups, tokens, width // ranks if self.dim == -1 else width)
        arrivals = []
        for chunk in chunks:
            target = self._target(result, chunk)
            is_in_place = self.dim is None and target.is_contiguous()
            rows = chunk.rows.stop - chunk.rows.start
            addend = target if is_in_place else like.new_empty(groups, rows, width)
            compute(chunk.rows, addend)
            is_asynchronous = not (waits and chunk is chunks[-1])
            arrivals.append((chunk.rows, self._start(addend, target, is_asynchronous=is_asynchronous)))
        return Chunked(result, arrivals)

    def _target(self, result: Tensor, chunk: Chunk) -> Tensor:
        """Return where the sum of a chunk belongs, as a view of the result."""
        if self.dim == -1:
            return self.order.pick(result, chunk)
        return rows_of(result, chunk.part if self.dim == -2 else chunk.rows)

    def _start(self, addend: Tensor, target: Tensor, *, is_asynchronous: bool) -> Pending:
        if self.dim is None:
            return start_all_reduce(addend, self.group, out=target, is_asynchronous=is_asynchronous)
        if self.dim == -1:
            addend = addend.unflatten(1, (self.order.parts, -1))
        return start_reduce_scatter(addend, self.dim, self.group, out=target, is_asynchronous=is_asynchronous)
