"""Blends: the spaced one against a heap in plain Python, and what both promise."""

import heapq
import math

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tf.data.blend import BlendedDataset, GreedyBlend, SpacedBlend
from megatron_tf.data.build import build_dataset
from megatron_tf.data.gpt_dataset import GPTDataset
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.order import SampleOrder
from tests.support.data import loader_of, write_data_set
from tests.support.training import small_run

WEIGHTS = st.one_of(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40),
    st.lists(st.integers(1, 5).map(float), min_size=1, max_size=100),  # many that are due at the same time
)
FAR = 10**11
MANY = [99.0, *[1.0] * 99]


def phase(dataset):
    return ((dataset + 0.5) * (math.sqrt(5) - 1) / 2) % 1


def due(weights, dataset, sample):
    return (sample + 1 - phase(dataset)) / (weights[dataset] / math.fsum(weights))


def twin_blend(weights, size):
    """[(dataset, which of its samples)] of the first steps."""
    waiting = [(due(weights, d, 0), d, 0) for d in range(len(weights))]
    heapq.heapify(waiting)
    chosen = []
    for _ in range(size):
        _, dataset, sample = waiting[0]
        chosen.append((dataset, sample))
        heapq.heapreplace(waiting, (due(weights, dataset, sample + 1), dataset, sample + 1))
    return chosen


def steps_of(blend, first, count):
    which, samples = blend.steps(first, count)
    return list(zip(which.tolist(), samples.tolist(), strict=True))


def taken(which, datasets):
    """How many samples each of `datasets` has given after each step, [steps, datasets]."""
    return (np.asarray(which)[:, None] == np.arange(datasets)).cumsum(0)


@settings(max_examples=100, deadline=None)
@given(WEIGHTS)
def test_the_spaced_blend_equals_the_twin(weights):
    assert steps_of(SpacedBlend(weights), 0, 700) == twin_blend(weights, 700)


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.integers(0, FAR), st.randoms())
def test_random_access_gives_what_reading_in_order_does(weights, first, random):
    expected = steps_of(SpacedBlend(weights), first, 1500)
    blend = SpacedBlend(weights)
    places = random.sample(range(1500), 40)
    assert [blend.locate(first + place) for place in places] == [expected[place] for place in places]
    for place in places[:5]:
        assert steps_of(blend, first + place, 1) == [expected[place]]


@settings(max_examples=100, deadline=None)
@given(WEIGHTS)
def test_every_set_is_less_than_one_sample_from_its_share_of_one_time_after_every_step(weights):
    blend = SpacedBlend(weights)
    which, samples = blend.steps(0, 600)
    times = np.array([due(weights, d, k) for d, k in zip(which.tolist(), samples.tolist(), strict=True)])
    away = taken(which, len(weights)) - blend.shares * times[:, None]
    assert (abs(away) < 1).all()


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0] * 100, MANY, [1.0, 2.0, 4.5], np.logspace(0, 4, 30).tolist()])
@pytest.mark.parametrize("blend", [SpacedBlend, GreedyBlend])
def test_every_set_stays_near_its_share_of_the_steps(weights, blend):
    """Small sets of the same weight do not come in one burst either, which would be 25 samples of `MANY`."""
    mixed, steps = blend(weights), range(20_000)
    which = [mixed.locate(step)[0] for step in steps]
    shares = np.array(weights) / sum(weights)
    assert abs(taken(which, len(weights)) - shares * (np.array(steps) + 1)[:, None]).max() < 2.6


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.sampled_from([0, 12_345, FAR, 10**15]))
def test_the_samples_of_a_set_come_one_after_another(weights, first):
    """Nothing is left out or comes twice: all samples due before the next one of each set are there, and no other."""
    which, samples = SpacedBlend(weights).steps(first, 3000)
    own = {dataset: samples[which == dataset].tolist() for dataset in set(which.tolist())}
    order = [
        (due(weights, dataset, sample), dataset)
        for dataset, sample in zip(which.tolist(), samples.tolist(), strict=True)
    ]
    assert order == sorted(order)
    for dataset, numbers in own.items():
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert (due(weights, dataset, numbers[-1] + 1), dataset) > order[-1]
    if len(own) == len(weights):
        assert sum(numbers[0] for numbers in own.values()) == first


@pytest.fixture
def sets(tmp_path):
    """Two sets of samples of 8 + 1 ids that no other sample has."""

    def gpt(name, tokens):
        prefix = write_data_set(tmp_path / name, [tokens[i : i + 11] for i in range(0, len(tokens), 11)])
        indexed = IndexedDataset(prefix)
        order = SampleOrder(indexed.document_lengths, seq_length=8, seed=1, name=name, cache=tmp_path / "cache")
        return GPTDataset(indexed, range(len(indexed)), order)

    return gpt("d", list(range(400))), gpt("e", list(range(1000, 1900)))


@pytest.mark.parametrize("blend", [SpacedBlend, GreedyBlend])
def test_every_sample_of_every_set_comes_once_in_each_of_its_epochs(sets, blend):
    mixed = BlendedDataset(sets, blend([1.0, 3.0]))
    read = [tuple(mixed[step].tolist()) for step in range(700)]
    of_first = [ids for ids in read if ids[0] < 1000]
    of_second = [ids for ids in read if ids[0] >= 1000]
    for dataset, own in zip(sets, (of_first, of_second), strict=True):
        epoch = dataset.order.samples_per_epoch
        assert len(own) > 3 * epoch
        for start in range(0, len(own) - epoch + 1, epoch):
            assert len(set(own[start : start + epoch])) == epoch
            assert own[start : start + epoch] == [tuple(dataset[start + i].tolist()) for i in range(epoch)]


@pytest.mark.parametrize("blend", [SpacedBlend, GreedyBlend])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_batches_of_a_blend_do_not_depend_on_the_number_of_replicas(sets, blend, replicas):
    first = 1016  # the batch reaches over the end of a block of the spaced blend
    mixed = [BlendedDataset(sets, blend([1.0, 3.0])) for _ in range(replicas)]
    loaders = [loader_of(mixed[replica], lambda _: 16, replica, replicas, first) for replica in range(replicas)]
    batches = np.stack([next(loader).ids.numpy() for loader in loaders], axis=1)
    expected = BlendedDataset(sets, blend([1.0, 3.0]))
    assert batches.reshape(16, 9).tolist() == [expected[first + i].tolist() for i in range(16)]


def test_a_greedy_blend_is_the_same_however_far_it_is_read():
    blend = GreedyBlend([1.0, 3.0])
    before = [blend.locate(step) for step in range(100)]
    far = [blend.locate(step) for step in range(69_000, 70_000)]
    assert [blend.locate(step) for step in range(100)] == before
    assert abs(np.mean([which for which, _ in far]) - 0.75) < 1e-3


def test_the_blend_of_a_later_version_is_refused(tmp_path):
    paths = [str(write_data_set(tmp_path / name, [list(range(50))] * 20)) for name in "ab"]
    config = small_run(data={"data_path": paths})
    assert isinstance(build_dataset(config).blend, SpacedBlend)
    assert isinstance(build_dataset(config, "greedy").blend, GreedyBlend)
    with pytest.raises(DataError, match="in the order 'better', which this version does not support"):
        build_dataset(config, "better")
