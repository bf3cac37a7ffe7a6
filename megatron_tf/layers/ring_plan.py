"""Which queries attend to which keys in each step of a ring, as blocks without a mask but a causal one.

With documents apart there are such blocks too: of two chunks of a sequence, at most one document reaches from one into
the other, and its tokens are contiguous in both. So no block has a query that attends to nothing, whose log-sum-exp
would be -inf, and in the first step every query attends to itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_tf.parallel.context import Context


@dataclass(frozen=True)
class Block:
    """Queries of this rank and keys of one rank that all attend to each other, but for a causal mask."""

    queries: slice
    """Indices among the tokens of this rank."""
    keys: slice
    """Indices among the tokens of the other rank."""
    is_causal: bool = False
    """Whether query i of the block attends to its keys 0 to i only."""
    samples: slice = field(default_factory=lambda: slice(None))  # all of them


Plan = Sequence[Sequence[Block]]
"""The blocks of each of R steps. In step i, a rank has the keys and values of the i-th rank before it in the ring."""


def plan_sequences(context: Context, tokens: int) -> Plan:
    """Plan the attention of each token to all earlier ones; a rank has `tokens` of each sequence.

    Every step but the first computes half of the pairs of queries and keys, on every rank.
    """
    assert context.group is not None
    rank, half = context.group.rank(), tokens // 2
    every, first, second = slice(0, tokens), slice(0, half), slice(half, tokens)
    # an earlier rank has one chunk before both of this rank's, and one after them; those of a later rank are between
    earlier, later = Block(every, first), Block(second, every)
    steps = range(1, context.group.size())
    return [[Block(every, every, is_causal=True)], *([earlier if step <= rank else later] for step in steps)]


def plan_documents(context: Context, tokens: int, documents: Sequence[Sequence[int]]) -> Plan:
    """Plan the attention of each token to the earlier ones of its document.

    `documents` are the lengths of documents in each sample, of which zeros are padding.
    """
    assert context.group is not None
    rank, size = context.group.rank(), context.group.size()
    return [
        [
            block
            for sample, lengths in enumerate(documents)
            for start, stop in _bounds(lengths)
            for block in _blocks(context, (rank - step) % size, tokens // 2, document=(start, stop), sample=sample)
        ]
        for step in range(size)
    ]


def _bounds(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for length in lengths:
        yield start, start + length
        start += length


def _blocks(
    context: Context, source: int, chunk_size: int, *, document: tuple[int, int], sample: int
) -> Iterator[Block]:
    """Yield the blocks of a document in which queries of this rank attend to keys of the rank `source`."""
    assert context.group is not None
    for i, own in enumerate(context.chunks_of(context.group.rank())):
        queries = _part(document, own, i, chunk_size)
        for j, other in enumerate(context.chunks_of(source)):
            keys = _part(document, other, j, chunk_size)
            if other <= own and queries and keys:
                yield Block(queries, keys, is_causal=other == own, samples=slice(sample, sample + 1))


def _part(document: tuple[int, int], chunk: int, index: int, size: int) -> slice | None:
    """Return the tokens of a document [start, stop) that are in a chunk, the rank's `index`-th; None without any."""
    start, stop = (min(max(bound - chunk * size, 0), size) for bound in document)
    return slice(index * size + start, index * size + stop) if start < stop else None
