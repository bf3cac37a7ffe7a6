"""The C++ order of samples against a Python twin, whose random numbers are numpy's own Philox."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tf._index import blend, permutation, sample_index


def twin_permutation(n, key0, key1):
    generator = np.random.Philox(key=np.array([key0, key1], dtype=np.uint64))
    result = list(range(n))
    for i in range(n - 1, 0, -1):
        mask = (1 << i.bit_length()) - 1
        while (draw := int(generator.random_raw()) & mask) > i:
            pass
        result[i], result[draw] = result[draw], result[i]
    return result


def twin_sample_index(order, lengths, seq_length):
    stream = [(place, offset) for place, document in enumerate(order) for offset in range(lengths[document])]
    samples = (len(stream) - 1) // seq_length if stream else -1
    return [list(stream[i * seq_length]) for i in range(samples + 1)]


def twin_blend(weights, size):
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    taken = np.zeros(len(weights))
    chosen = []
    for i in range(size):
        d = int(np.argmax(shares * max(i, 1) - taken))
        chosen.append((d, int(taken[d])))
        taken[d] += 1
    return chosen


@pytest.mark.parametrize("n", [0, 1, 2, 3, 64, 1000])
@pytest.mark.parametrize("keys", [(0, 0), (1, 2), (2**64 - 1, 12345)])
def test_permutation_equals_the_twin(n, keys):
    assert permutation(n, *keys).tolist() == twin_permutation(n, *keys)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 7), st.randoms())
def test_sample_index_equals_the_twin(lengths, seq_length, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    got = sample_index(np.array(order, np.int64), np.array(lengths, np.int64), seq_length)
    assert got.tolist() == twin_sample_index(order, lengths, seq_length)


@pytest.mark.parametrize(
    "lengths, expected", [([4, 4, 1], [[0, 0], [1, 0], [2, 0]]), ([3, 0, 0, 6], [[0, 0], [3, 1], [3, 5]])]
)
def test_sample_index_of_the_format_page(lengths, expected):
    assert sample_index(np.arange(len(lengths)), np.array(lengths), 4).tolist() == expected


def test_counts_beyond_32_bits():
    lengths = np.array([2**31 + 5, 2**32 + 1, 2**31], dtype=np.int64)
    index = sample_index(np.array([2, 0, 1]), lengths, 2**30)
    total = int(lengths.sum())
    assert len(index) == (total - 1) // 2**30 + 1
    starts = np.array([0, 2**31, 2**32 + 5])
    assert [int(starts[p]) + int(o) for p, o in index] == [i * 2**30 for i in range(len(index))]


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [1.0, 2.0, 4.5], [1e-3, 1.0]])
def test_blend_equals_the_twin(weights):
    dataset, sample = blend(np.array(weights), 500)
    assert list(zip(dataset.tolist(), sample.tolist(), strict=True)) == twin_blend(weights, 500)
    shares = np.array(weights) / sum(weights)
    for prefix in (100, 500):
        counts = np.bincount(dataset[:prefix], minlength=len(weights))
        assert (abs(counts - shares * prefix) <= 1.5).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: permutation(-1, 0, 0),
        lambda: sample_index(np.array([3]), np.array([1]), 4),
        lambda: sample_index(np.array([0]), np.array([-1]), 4),
        lambda: sample_index(np.array([0]), np.array([1]), 0),
        lambda: sample_index(np.array([0, 1]), np.array([2**63 - 1, 2**63 - 1]), 4),
        lambda: blend(np.array([1.0, 0.0]), 4),
        lambda: blend(np.array([1.0, np.nan]), 4),
        lambda: blend(np.array([]), 4),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises((ValueError, IndexError, OverflowError)):
        call()
