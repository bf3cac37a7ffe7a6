"""The order `lanes` against the same order written with lists, and its promise: each token of an epoch exactly once."""

import json
import math
from collections import deque

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.lanes import MOST_CUTS, START, Cut, LaneOrder, LanePosition

CHANGES = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40)), min_size=1, max_size=8)
"""(seq_length, samples read at it) one after the other."""


class ListedLanes:
    """The order of a set, with every token of the epoch in a list."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.epoch = 0
        self.left_out = []
        self.length = None
        self._lanes, self._tail = [], list(range(tokens))

    @property
    def unread(self):
        return [token for lane in self._lanes for sample in lane for token in sample] + self._tail

    def read(self, length):
        """(epoch, targets) of the next sample of `length` tokens."""
        if length != self.length:
            self._divide(length)
        if not any(self._lanes):
            self.left_out += [(self.epoch, token) for token in self._tail]
            self.epoch += 1
            self._lanes, self._tail = [], list(range(self.tokens))
            self._divide(length)
        while not self._lanes[self._next]:
            self._next = (self._next + 1) % len(self._lanes)
        sample = self._lanes[self._next].popleft()
        self._next = (self._next + 1) % len(self._lanes)
        return self.epoch, sample

    def _divide(self, length):
        unread, count = self.unread, len(self.unread) // length
        samples = deque(unread[i * length : (i + 1) * length] for i in range(count))
        lanes = max(1, math.isqrt(count))
        sizes = [count // lanes + (lane < count % lanes) for lane in range(lanes)]
        self._lanes = [deque(samples.popleft() for _ in range(size)) for size in sizes]
        self._tail = unread[count * length :]
        self._next, self.length = 0, length


def read(order, samples):
    """[(epoch, targets)] of the first samples."""
    found = [order.locate(sample) for sample in range(samples)]
    return [(epoch, [token for span in spans for token in range(*span)]) for epoch, spans in found]


@settings(max_examples=300, deadline=None)
@given(st.integers(12, 150), CHANGES)
def test_the_arithmetic_gives_the_order_of_the_lists(tokens, changes):
    listed, position = ListedLanes(tokens), START
    for length, samples in changes:
        order = LaneOrder(tokens, seq_length=length, name="set", start=position)
        assert read(order, samples) == [listed.read(length) for _ in range(samples)]
        position = order.after(samples)
        assert (position.epoch, position.left_out) == (listed.epoch, len(listed.left_out))
        unread = tokens - sum(length * visits for length, visits in position.cuts)
        assert unread == len(listed.unread)


@settings(max_examples=300, deadline=None)
@given(st.integers(12, 150), CHANGES)
def test_no_token_of_an_epoch_is_lost_or_repeated_whatever_the_sequence_lengths(tokens, changes):
    position, seen = START, []
    for length, samples in changes:
        order = LaneOrder(tokens, seq_length=length, name="set", start=position)
        seen += [(epoch, token) for epoch, targets in read(order, samples) for token in targets]
        position = order.after(samples)
    assert len(seen) == len(set(seen))
    complete = position.epoch * tokens
    assert sum(epoch < position.epoch for epoch, _ in seen) + position.left_out == complete
    assert len(seen) - (complete - position.left_out) == sum(length * visits for length, visits in position.cuts)
    assert all(0 <= token < tokens for _, token in seen)


@settings(max_examples=200, deadline=None)
@given(st.integers(12, 150), CHANGES, st.data())
def test_a_restart_at_any_sample_reads_what_follows(tokens, changes, data):
    position = START
    for length, samples in changes:
        order = LaneOrder(tokens, seq_length=length, name="set", start=position)
        at = data.draw(st.integers(0, samples))
        saved = LanePosition.from_json(json.loads(json.dumps(order.after(at).to_json())))
        restarted = LaneOrder(tokens, seq_length=length, name="set", start=saved)
        assert read(restarted, samples - at) == read(order, samples)[at:]
        position = restarted.after(samples - at)
        assert position == order.after(samples)


def test_windows_of_one_document_are_read_far_apart():
    order = LaneOrder(16 * 10_000, seq_length=16, name="set")
    visits = {order.locate(sample)[1][0][0] // 16: sample for sample in range(10_000)}
    distances = [visits[number + 1] - visits[number] for number in range(9_999)]
    assert min(map(abs, distances)) == 100  # as many as there are lanes
    assert sum(distance == 100 for distance in distances) == 9_900


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_longer_samples_are_contiguous_text_up_to_a_seam_for_each_lane(share):
    length, longer = 16, 256
    order = LaneOrder(length * 1_000_000, seq_length=length, name="set")
    position = order.after(int(share * 1_000_000) + 345)
    longer_order = LaneOrder(order.tokens, seq_length=longer, name="set", start=position)
    total = Cut(order.tokens - length * position.cuts[0][1], longer).samples
    pieces = [len(longer_order.locate(sample)[1]) for sample in range(total)]
    assert sum(count > 1 for count in pieces) <= 1_000
    assert sum(count == 1 for count in pieces) >= 0.8 * total


def test_a_change_back_to_the_latest_length_continues_its_lanes():
    order = LaneOrder(1_000, seq_length=4, name="set")
    other = LaneOrder(1_000, seq_length=8, name="set", start=order.after(70))
    back = LaneOrder(1_000, seq_length=4, name="set", start=other.after(0))
    assert read(back, 100) == read(order, 170)[70:]


def test_a_position_takes_less_than_1_kb_after_as_many_changes_as_are_allowed():
    tokens, position = 10**16, START
    for number in range(MOST_CUTS):
        length = 131_072 + number % 2
        order = LaneOrder(tokens, seq_length=length, name="set", start=position)
        position = order.after(10**8 + number)
    assert len(position.cuts) == MOST_CUTS
    assert len(json.dumps(position.to_json())) < 1_000
    with pytest.raises(DataError, match="has had 32 sequence lengths in its current epoch"):
        LaneOrder(tokens, seq_length=4, name="set", start=position)


def test_far_samples_of_a_large_set_are_found_at_once():
    order = LaneOrder(10**13, seq_length=2048, name="set")
    later = LaneOrder(10**13, seq_length=32_768, name="set", start=order.after(2 * 10**9))
    epoch, spans = later.locate(10**8)
    assert epoch == 0
    assert sum(stop - start for start, stop in spans) == 32_768


def test_a_set_too_small_for_one_sample_is_refused():
    with pytest.raises(DataError, match="set has 7 tokens, too few for one sample of 8"):
        LaneOrder(7, seq_length=8, name="set")
    assert LaneOrder(8, seq_length=8, name="set").locate(3) == (3, [(0, 8)])
