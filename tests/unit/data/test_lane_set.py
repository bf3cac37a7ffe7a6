"""Samples under `data.order: lanes` are the tokens of files: each once, after the token that precedes it."""

import itertools
from collections import Counter

import numpy as np
import pytest

from megatron_tf.config import ConfigError
from megatron_tf.data.build import build_dataset, open_phase
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.lane_set import LaneSet
from megatron_tf.data.phases import Reading
from tests.support.data import write_data_set
from tests.support.training import small_run

SIZES = [5, 0, 1, 17, 3, 0, 40, 9, 2, 23]
TOKENS = sum(SIZES)
ALL = range(len(SIZES))


@pytest.fixture
def prefix(tmp_path):
    """A set of the ids 0, 1, 2 ... in documents of these sizes."""
    return write_documents(tmp_path / "set", 0)


def write_documents(path, first):
    ends = first + np.cumsum(SIZES)
    return write_data_set(path, [range(end - size, end) for end, size in zip(ends, SIZES, strict=True)])


def run_on(*prefixes, seq_length=8, **data):
    data = {"data_path": [*map(str, prefixes)], "split": "1,0,0", "order": "lanes", **data}
    return small_run(training={"seq_length": seq_length}, data=data)


def open_set(prefix, seed=1, documents=ALL):
    return LaneSet(IndexedDataset(prefix), documents, seed=seed)


def ring_of(lanes, epoch):
    """All tokens of an epoch, with the last one in front of them."""
    return lanes.ids(Reading("set", epoch, [(0, TOKENS)])).tolist()


def test_an_epoch_is_every_token_in_documents_that_are_shuffled_again_each_time(prefix):
    lanes = open_set(prefix)
    rings = [ring_of(lanes, epoch) for epoch in range(3)]
    for ring in rings:
        assert ring[0] == ring[-1]
        assert sorted(ring[1:]) == [*range(TOKENS)]
        document_ends = np.cumsum(SIZES) - 1
        jumps = [here for here, after in itertools.pairwise(ring[1:]) if after != here + 1]
        assert set(jumps) <= {*document_ends.tolist()}
    assert len(set(map(tuple, rings))) == 3
    assert ring_of(open_set(prefix), 1) == rings[1]
    assert ring_of(open_set(prefix, seed=2), 0) != rings[0]


def test_a_sample_of_any_spans_starts_with_the_token_before_its_first_target(prefix):
    lanes, ring = open_set(prefix), ring_of(open_set(prefix), 0)
    for spans in ([(0, 7)], [(3, 60)], [(90, 100), (20, 21), (0, 4)]):
        targets = [place for span in spans for place in range(*span)]
        ids = lanes.ids(Reading("set", 0, spans)).tolist()
        assert ids == [ring[targets[0]], *(ring[place + 1] for place in targets)]
        places = [lanes.place(Reading("set", 0, spans), position) for position in range(len(ids))]
        starts = np.cumsum(SIZES) - SIZES
        assert [starts[document] + offset for _, document, offset in places] == ids
        with pytest.raises(IndexError):
            lanes.place(Reading("set", 0, spans), len(ids))


def test_a_set_is_known_by_its_lengths_split_and_seed(prefix, tmp_path):
    ring = open_set(prefix).ring
    (tmp_path / "copy").mkdir()
    assert open_set(write_documents(tmp_path / "copy" / "set", 7)).ring == ring
    assert open_set(prefix, seed=2).ring.key != ring.key
    assert open_set(prefix, documents=range(1, len(SIZES))).ring != ring
    assert ring.tokens == TOKENS


def test_a_run_reads_each_token_of_its_files_once_through_changes_of_length_and_weights(prefix, tmp_path):
    other = write_documents(tmp_path / "other", 500)
    targets, sample, phase = Counter(), 0, None
    for length, weights, count in ((8, (0.5, 0.5), 7), (16, (0.7, 0.3), 5), (4, (0.1, 0.9), 3), (2, (0.6, 0.4), 11)):
        paths = [f"{weights[0]} {prefix}", f"{weights[1]} {other}"]
        config = run_on(*paths, seq_length=length)
        phase = open_phase(config, sample=sample, saved=phase)
        dataset = build_dataset(config, phase=phase)
        for number in range(sample, sample + count):
            ids = dataset[number]
            assert ids.shape == (length + 1,)
            targets.update(ids[1:].tolist())
            assert dataset.place(number, 1)[0].name == ("set" if ids[1] < 500 else "other")
        sample += count
    assert max(targets.values()) == 1
    assert len(targets) == 7 * 8 + 5 * 16 + 3 * 4 + 11 * 2
    with pytest.raises(DataError, match="sample 3 was read in an earlier phase of the data: this one starts at 15"):
        dataset[3]


def test_an_unchanged_configuration_continues_its_phase(prefix):
    config = run_on(prefix)
    phase = open_phase(config, sample=0, saved=None)
    assert open_phase(config, sample=9, saved=phase) == phase
    assert open_phase(run_on(prefix, seq_length=4), sample=9, saved=phase)["first"] == 9
    assert open_phase(run_on(prefix, order="counter"), sample=9, saved=phase) is None


def test_two_sets_of_one_name_and_sets_that_are_too_small_are_refused(prefix, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    twin = write_documents(tmp_path / "elsewhere" / "set", 0)
    with pytest.raises(ConfigError, match="two datasets are called set"):
        build_dataset(run_on(prefix, twin))
    with pytest.raises(DataError, match="set has 100 tokens, too few for one sample of 101"):
        build_dataset(run_on(prefix, seq_length=101))
