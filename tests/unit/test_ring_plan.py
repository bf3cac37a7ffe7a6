"""The blocks of all ranks and steps of a ring are the pairs of a causal mask, once each; all ranks work the same."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from megatron_tf.layers.ring_plan import plan_documents, plan_sequences
from megatron_tf.parallel.context import Context

TOKENS = 24
DOCUMENTS = [[24], [1, 22, 1], [5, 0, 7, 1, 11], [3] * 8 + [0], [23, 1]]
"""Of five samples: on one rank and on all, as long as a chunk, of one token, padded."""


@dataclass(frozen=True)
class Ranks:
    """What a plan asks of a process group."""

    index: int
    number: int

    def rank(self):
        return self.index

    def size(self):
        return self.number


def pairs(size, plan):
    """How often each query attends to each key, [sample, S, S], by the plans of all ranks."""
    count = torch.zeros(len(DOCUMENTS), TOKENS, TOKENS, dtype=torch.int64)
    for rank in range(size):
        context = Context(Ranks(rank, size))
        own = context.cut(torch.arange(TOKENS))
        for step, blocks in enumerate(plan(context, TOKENS // size)):
            others = Context(Ranks((rank - step) % size, size)).cut(torch.arange(TOKENS))
            for block in blocks:
                queries, keys = own[block.queries], others[block.keys]
                seen = torch.ones(len(queries), len(keys), dtype=torch.int64)
                seen = seen.tril() if block.is_causal else seen
                assert seen.any(1).all(), "a query that attends to nothing"
                samples = torch.arange(len(DOCUMENTS))[block.samples]
                count[samples[:, None, None], queries[:, None], keys] += seen
    return count


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_token_attends_to_all_earlier_ones_once(size):
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.int64).tril()
    assert torch.equal(pairs(size, plan_sequences), causal.expand(len(DOCUMENTS), -1, -1))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_token_attends_to_the_earlier_ones_of_its_document_once(size):
    expected = torch.zeros(len(DOCUMENTS), TOKENS, TOKENS, dtype=torch.int64)
    for sample, lengths in enumerate(DOCUMENTS):
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        for start, stop in pairwise(bounds):
            expected[sample, start:stop, start:stop] = 1
    found = pairs(size, lambda context, tokens: plan_documents(context, tokens, DOCUMENTS))
    assert torch.equal(found, expected.tril())


def test_every_rank_has_the_same_work_in_every_step():
    for size in (2, 3, 4):
        plans = [plan_sequences(Context(Ranks(rank, size)), 12) for rank in range(size)]
        assert all(work(plan) == [12 * 13 // 2, *[12 * 12 // 2] * (size - 1)] for plan in plans)


def work(plan):
    """The number of pairs of a query and a key in each step."""
    steps = []
    for blocks in plan:
        sizes = [[len(range(12)[part]) for part in (block.queries, block.keys)] for block in blocks]
        steps.append(sum(q * (q + 1) // 2 if b.is_causal else q * k for b, (q, k) in zip(blocks, sizes, strict=True)))
    return steps
