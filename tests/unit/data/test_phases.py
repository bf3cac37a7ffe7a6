"""Exactly once, over random histories of a run: changes of data, lengths and batches, kills, rewinds and growth."""

import json
from collections import Counter
from dataclasses import dataclass, field

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tf.data.lanes import MOST_CUTS, LanePosition
from megatron_tf.data.phases import Phase, Ring, SetState

RINGS = {"a": Ring(97), "b": Ring(64), "c": Ring(23), "d": Ring(150)}
OTHER_RINGS = {"a": Ring(90), "b": Ring(64, "other seed"), "c": Ring(31), "d": Ring(21)}
WEIGHTS = st.dictionaries(st.sampled_from([*RINGS]), st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=1)
LENGTHS = st.integers(1, 20)
BATCHES = st.integers(1, 3).map(lambda micro_batches: 2 * micro_batches)

EVENTS = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 6)),
    st.tuples(st.just("skip"), st.just(None)),
    st.tuples(st.just("save"), st.just(None)),
    st.tuples(st.just("kill"), st.just(None)),
    st.tuples(st.just("rewind"), st.just(None)),
    st.tuples(st.just("grow"), st.just(None)),
    st.tuples(st.just("ranks"), st.sampled_from([1, 2])),
    st.tuples(st.just("batch"), BATCHES),
    st.tuples(st.just("length"), LENGTHS),
    st.tuples(st.just("weights"), WEIGHTS),
    st.tuples(st.just("renew"), st.sampled_from([RINGS, OTHER_RINGS])),
)


@dataclass
class Checkpoint:
    """What a killed run finds on disk, and which tokens its model had seen."""

    phase: str
    samples: int
    read: list
    skipped: list
    rewound: list
    rings: dict
    sizes: dict


@dataclass
class Run:
    """A run on unique tokens (set, epoch, token); `read` are those that a step trained on."""

    phase: Phase
    batch: int = 2
    ranks: int = 1
    samples: int = 0
    read: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    rewound: list = field(default_factory=list)
    rings: dict = field(default_factory=lambda: RINGS)
    sizes: dict = field(default_factory=dict)
    """Tokens of each epoch of which something was read."""

    def __post_init__(self):
        self.save()

    def next_batch(self):
        """The targets of the next global batch, put together from all ranks."""
        numbers = range(self.samples, self.samples + self.batch)
        self.samples += self.batch
        by_rank = [[self.targets(number) for number in numbers[rank :: self.ranks]] for rank in range(self.ranks)]
        return [target for samples in by_rank for targets in samples for target in targets]

    def targets(self, number):
        name, epoch, spans = self.phase.locate(number)
        size = self.phase.sets[name].ring.tokens
        assert self.sizes.setdefault((name, epoch), size) == size
        return [(name, epoch, token) for span in spans for token in range(*span)]

    def do(self, event, value):
        if event in ("ranks", "batch"):
            setattr(self, event, value)
        else:
            getattr(self, event)(*([] if value is None else [value]))

    def train(self, steps):
        for _ in range(steps):
            self.read += self.next_batch()

    def skip(self):
        first = self.samples
        self.skipped += self.next_batch()
        self.phase = self.phase.after_skip(first, self.samples)

    def save(self):
        phase = json.dumps(self.phase.to_json())
        self.saved = Checkpoint(
            phase,
            self.samples,
            read=[*self.read],
            skipped=[*self.skipped],
            rewound=[*self.rewound],
            rings=self.rings,
            sizes={**self.sizes},
        )

    def kill(self):
        """Resume from the checkpoint: what was read since does not count, as the model has not seen it either."""
        saved = self.saved
        self.phase, self.samples = Phase.from_json(json.loads(saved.phase)), saved.samples
        self.read, self.skipped, self.rewound = [*saved.read], [*saved.skipped], [*saved.rewound]
        self.rings, self.sizes = saved.rings, {**saved.sizes}

    def rewind(self):
        """Take back the model but not the data: what was read since the checkpoint is skipped."""
        self.rewound += self.read[len(self.saved.read) :]
        self.read = [*self.saved.read]
        saved = Phase.from_json(json.loads(self.saved.phase))
        self.phase = self.phase.after_rewind(self.samples, saved=saved, sample=self.saved.samples)

    def grow(self):
        """Save and restart with a larger model."""
        self.save()
        self.kill()

    def length(self, length):
        self._change(length, self.phase.weights)

    def weights(self, weights):
        self._change(self.phase.seq_length, weights)

    def renew(self, rings):
        """Continue with data of another split or seed."""
        self.rings = rings
        self._change(self.phase.seq_length, self.phase.weights)

    def _change(self, length, weights):
        self.phase = self.phase.change(self.samples, seq_length=length, weights=weights, rings=self.rings)


def start(length, weights):
    return Run(Phase.start(seq_length=length, weights=weights, rings=RINGS))


@settings(max_examples=1_000, deadline=None)
@given(LENGTHS, WEIGHTS, st.lists(EVENTS, max_size=25))
def test_every_token_of_an_epoch_is_read_skipped_or_counted_as_left_out_exactly_once(length, weights, events):
    run = start(length, weights)
    for event, value in events:
        run.do(event, value)
    handed_out = Counter(run.read + run.skipped + run.rewound)
    assert max(handed_out.values(), default=1) == 1
    for name, state in run.phase.states_at(run.samples).items():
        position = state.position
        epochs = [epoch for set_, epoch, _ in handed_out if set_ == name]
        assert max(epochs, default=0) <= position.epoch
        assert epochs.count(position.epoch) == position.read_of_epoch()
        left_out = sum(run.sizes[name, epoch] - epochs.count(epoch) for epoch in range(position.epoch))
        assert left_out == position.left_out
        kinds = run.read + run.skipped + run.rewound, run.skipped, run.rewound
        counts = [sum(set_ == name for set_, _, _ in kind) for kind in kinds]
        assert counts == [state.read, state.skipped, state.rewound]
        assert all(0 <= token < run.sizes[name, epoch] for set_, epoch, token in handed_out if set_ == name)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, WEIGHTS, st.lists(EVENTS, max_size=25), st.lists(st.sampled_from([1, 2]), min_size=25, max_size=25))
def test_layouts_and_kills_do_not_change_what_a_run_reads(length, weights, events, ranks):
    calm, rough = start(length, weights), start(length, weights)
    for (event, value), count in zip(events, ranks, strict=False):
        if event in ("kill", "rewind", "skip"):
            rough.save()
            rough.kill()
            rough.train(3)
            rough.kill()
            continue
        calm.do(event, value)
        rough.do(event, value)
        rough.ranks = count
    assert sorted(calm.read) == sorted(rough.read)
    assert calm.phase.states_at(calm.samples) == rough.phase.states_at(rough.samples)


def test_a_set_that_is_dropped_is_resumed_where_it_was_left():
    run = start(4, {"a": 1.0, "b": 1.0})
    run.train(8)
    run.weights({"b": 1.0})
    run.train(8)
    run.length(7)
    run.weights({"c": 1.0, "a": 2.0})
    run.train(4)
    tokens = [token for name, _, token in run.read if name == "a"]
    assert len(tokens) == len(set(tokens)) > 32
    position = run.phase.states_at(run.samples)["a"].position
    assert (position.epoch, position.cuts[0]) == (0, (4, 8))


def test_a_change_of_weights_alone_does_not_move_a_sets_order():
    run, other = start(4, {"d": 1.0}), start(4, {"d": 1.0})
    run.train(10)
    other.train(3)
    other.weights({"d": 2.0, "a": 0.1})
    other.train(12)
    kept = [target for target in other.read if target[0] == "d"]
    assert kept[: len(run.read)] == run.read[: len(kept)]


def test_a_set_in_another_order_than_it_was_read_in_starts_its_next_epoch():
    run = start(4, {"a": 1.0})
    run.train(5)
    phase = run.phase.change(10, seq_length=4, weights={"a": 1.0}, rings={"a": Ring(97, "other")})
    assert phase.sets["a"].position == LanePosition(epoch=1, left_out=97 - 40)
    assert phase.locate(10) == ("a", 1, [(0, 4)])
    unread = run.phase.change(0, seq_length=4, weights={"a": 1.0}, rings={"a": Ring(97, "other")})
    assert unread.sets["a"].position == LanePosition()


def test_the_record_of_a_phase_takes_less_than_1_kb_for_each_set():
    sets = {f"set {number}": Ring(10**16, "0" * 32) for number in range(20)}
    phase = Phase.start(seq_length=2048, weights=dict.fromkeys(sets, 1 / 3), rings=sets)
    for number in range(MOST_CUTS):
        length = 131_072 + number % 2
        phase = phase.change(
            phase.first + 10**10 + number, seq_length=length, weights=dict.fromkeys(sets, 1 / 3), rings=sets
        )
    assert max(len(state.position.cuts) for state in phase.sets.values()) >= MOST_CUTS - 1
    assert len(json.dumps(phase.to_json())) < 1_000 * len(sets)


def test_states_are_written_as_they_are_read():
    values = {"tokens": 9, "key": "f", "epoch": 2, "cuts": [[4, 1]], "left_out": 2}
    values |= {"read": 20, "skipped": 4, "rewound": 8}
    assert SetState.from_json(values).to_json() == values
