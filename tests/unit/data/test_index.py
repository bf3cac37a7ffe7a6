"""The C++ order of samples against a Python twin, whose random numbers are numpy's own Philox."""

import itertools

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tf.data._index import BLEND_BLOCK, greedy_blend, permutation, sample_index


class TwinStream:
    """numpy's Philox, word by word; halves of a word low half first."""

    def __init__(self, key0, key1, stream=0):
        key, counter = ([key0, key1], [0, stream, 0, 0])
        self.generator = np.random.Philox(
            key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
        )
        self.halves = []

    def word(self):
        return int(self.generator.random_raw())

    def at_most(self, bound):
        while True:
            if not self.halves:
                word = self.word()
                self.halves = [word >> 32, word & 0xFFFFFFFF]
            product = self.halves.pop() * (bound + 1)
            if product % 2**32 >= 2**32 % (bound + 1):
                return product >> 32


def twin_permutation(n, key0, key1, bucket_elements=2**15):
    bits = 0
    while bits < 16 and n >> bits > bucket_elements:
        bits += 1
    stream = TwinStream(key0, key1)
    buckets = [[] for _ in range(1 << bits)]
    for start in range(0, n, 4):
        word = stream.word()
        for i in range(start, min(start + 4, n)):
            buckets[(word & 0xFFFF) >> (16 - bits)].append(i)
            word >>= 16
    for number, bucket in enumerate(buckets):
        stream = TwinStream(key0, key1, number + 1)
        for i in range(len(bucket) - 1, 0, -1):
            other = stream.at_most(i)
            bucket[i], bucket[other] = bucket[other], bucket[i]
    return [i for bucket in buckets for i in bucket]


def twin_sample_index(order, lengths, seq_length):
    stream = [(place, offset) for place, document in enumerate(order) for offset in range(lengths[document])]
    samples = (len(stream) - 1) // seq_length if stream else -1
    return [list(stream[i * seq_length]) for i in range(samples + 1)]


def twin_greedy_blend(weights, size):
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    taken = np.zeros(len(weights))
    chosen = []
    for i in range(size):
        d = int(np.argmax(shares * max(i, 1) - taken))
        chosen.append(d)
        taken[d] += 1
    return chosen


@pytest.mark.parametrize("n", [0, 1, 2, 3, 64, 1000, 2**15, 2**15 + 1, 150_001])
@pytest.mark.parametrize("keys", [(0, 0), (1, 2), (2**64 - 1, 12345)])
def test_permutation_equals_the_twin(n, keys):
    assert permutation(n, *keys).tolist() == twin_permutation(n, *keys)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 7), st.randoms())
def test_sample_index_equals_the_twin(lengths, seq_length, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    expected = twin_sample_index(order, lengths, seq_length)
    for ids, counts in itertools.product((np.uint32, np.int64), (np.int32, np.int64)):
        position, offset = sample_index(np.array(order, ids), np.array(lengths, counts), seq_length)
        assert (position.dtype, offset.dtype) == (ids, counts)
        assert np.stack([position, offset], 1).tolist() == expected


TYPES = list(itertools.product((np.uint32, np.int64), (np.int32, np.int64)))


@pytest.mark.parametrize("ids, counts", TYPES)
@pytest.mark.parametrize("documents", [63, 64, 65, 79, 80, 81, 96, 1000, 600_011])
def test_sample_index_of_many_documents_equals_numpy(documents, ids, counts):
    """From 65 on lengths are fetched ahead; 600,011 are more than one window."""
    random = np.random.default_rng(documents)
    lengths = random.integers(0, 900, documents).astype(counts)
    order = random.permutation(documents).astype(ids)
    position, offset = sample_index(order, lengths, 2048)
    ends = np.cumsum(lengths[order], dtype=np.int64)
    boundaries = np.arange(0, ends[-1], 2048)
    expected = np.searchsorted(ends, boundaries, side="right")
    assert np.array_equal(position, expected)
    assert np.array_equal(offset, boundaries - (ends[expected] - lengths[order][expected]))


@pytest.mark.parametrize("ids, counts", TYPES)
@pytest.mark.parametrize("place", [0, 15, 16, 131, 199])
def test_bad_documents_among_many_are_named(place, ids, counts):
    lengths, order = np.full(200, 7, counts), np.arange(200).astype(ids)
    order[place] = 200
    with pytest.raises(IndexError, match="document 200 of 200"):
        sample_index(order, lengths, 10)
    order[place], lengths[place] = place, -1
    with pytest.raises(ValueError, match=f"document {place} has a negative length"):
        sample_index(order, lengths, 10)


@pytest.mark.parametrize(
    "lengths, expected", [([4, 4, 1], [[0, 0], [1, 0], [2, 0]]), ([3, 0, 0, 6], [[0, 0], [3, 1], [3, 5]])]
)
def test_sample_index_of_the_format_page(lengths, expected):
    assert np.stack(sample_index(np.arange(len(lengths)), np.array(lengths), 4), 1).tolist() == expected


def test_a_sample_index_of_several_windows():
    """More documents than a thread takes at a time, against cumulative sums."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(0, 40, 1_300_000).astype(np.int32)
    order = generator.permutation(len(lengths)).astype(np.uint32)
    position, offset = sample_index(order, lengths, 7)
    ends = np.cumsum(lengths[order], dtype=np.int64)
    boundaries = np.arange((ends[-1] - 1) // 7 + 1) * 7
    places = np.searchsorted(ends, boundaries, side="right")
    assert (position == places).all()
    assert (offset == boundaries - (ends - lengths[order])[places]).all()


def test_counts_beyond_32_bits():
    lengths = np.array([2**31 + 5, 2**32 + 1, 2**31], dtype=np.int64)
    index = np.stack(sample_index(np.array([2, 0, 1]), lengths, 2**30), 1)
    total = int(lengths.sum())
    assert len(index) == (total - 1) // 2**30 + 1
    starts = np.array([0, 2**31, 2**32 + 5])
    assert [int(starts[p]) + int(o) for p, o in index] == [i * 2**30 for i in range(len(index))]


def test_counts_beyond_32_bits_in_32_bit_lengths():
    """2^32 and 2^33 tokens in documents whose own lengths fit: 2^31 - 1 tokens each."""
    lengths = np.full(5, 2**31 - 1, dtype=np.int32)
    position, offset = sample_index(np.arange(5, dtype=np.uint32), lengths, 2**20)
    stream = position.astype(np.int64) * (2**31 - 1) + offset
    assert stream.tolist() == [i * 2**20 for i in range((5 * (2**31 - 1) - 1) // 2**20 + 1)]


def shares(seed, count):
    return (np.random.default_rng(seed).integers(1, 1000, count) / 7).tolist()


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [0.5, 0.5],
        [1.0, 2.0, 4.5],
        [1e-3, 1.0],
        [1.0, 2.0] * 3,
        [3.0] * 50,
        [3.0] * 70,
        [1e-9, 1.0, 1.0],
        [1e-9, *[1.0, 2.0] * 40],
        [1, 2, 3, 3, 2, 1],
    ]
    + [shares(seed, count) for seed, count in enumerate([5, 8, 9, 22, 31, 32, 33, 40, 64, 65, 100, 300])],
    ids=lambda weights: f"{len(weights)}",
)
def test_the_greedy_blend_equals_the_twin(weights):
    size = BLEND_BLOCK + 900
    dataset, taken = greedy_blend(np.array(weights, dtype=np.float64), size)
    assert dataset.tolist() == twin_greedy_blend(weights, size)
    assert taken.tolist() == [np.bincount(dataset[:n], minlength=len(weights)).tolist() for n in (0, BLEND_BLOCK)]
    for prefix in (100, 500, 3000):
        counts = np.bincount(dataset[:prefix], minlength=len(weights))
        assert (abs(counts - np.array(weights) / sum(weights) * prefix) <= 1.5).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: permutation(-1, 0, 0),
        lambda: sample_index(np.array([3]), np.array([1]), 4),
        lambda: sample_index(np.array([-1]), np.array([1]), 4),
        lambda: sample_index(np.array([0]), np.array([-1], np.int32), 4),
        lambda: sample_index(np.array([0]), np.array([-1]), 4),
        lambda: sample_index(np.array([0]), np.array([1]), 0),
        lambda: sample_index(np.array([0, 1]), np.array([2**63 - 1, 2**63 - 1]), 4),
        lambda: greedy_blend(np.array([1.0, 0.0]), 4),
        lambda: greedy_blend(np.array([1.0, np.nan]), 4),
        lambda: greedy_blend(np.array([]), 4),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises((ValueError, IndexError, OverflowError)):
        call()
