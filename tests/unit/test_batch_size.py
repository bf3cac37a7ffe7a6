"""Batch-size ramp-up: a function of consumed samples alone, the same samples on any number of replicas."""

import itertools

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tf.config import ConfigError, TrainingConfig
from megatron_tf.data.build import samples_of_run
from megatron_tf.data.sample import Sample
from megatron_tf.training.step.batch_sizes import check_batch_sizes
from tests.support.data import loader_of
from tests.support.training import small_run


def training(global_batch_size, ramp=None, micro_batch_size=1):
    return TrainingConfig(
        seq_length=4,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        rampup_batch_size=ramp,
        train_iters=10,
    )


def test_megatrons_example():
    """Megatron-LM's help: 16 8 300000 with 1024 ramps up in (1024 - 16) / 8 = 126 steps of 300000 / 126 samples."""
    config = training(1024, (16, 8, 300_000))
    for increments in (0, 1, 2, 63, 125):
        first = -(-300_000 * increments // 126)
        assert config.batch_size_at(first) == 16 + 8 * increments
        assert config.batch_size_at(first + 2379) == 16 + 8 * increments
    assert config.batch_size_at(299_999) == 1016
    assert config.batch_size_at(300_000) == config.batch_size_at(10**12) == 1024


ramps = st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12), st.integers(1, 300))


@settings(deadline=None)
@given(ramps)
def test_any_ramp_rises_from_its_start_to_the_whole_size(values):
    start, increment, increments, samples = values
    config = training(start + increment * increments, (start, increment, samples))
    sizes = [config.batch_size_at(consumed) for consumed in range(samples + 50)]
    assert sizes[0] == start
    assert all(a <= b for a, b in itertools.pairwise(sizes))
    assert set(sizes) <= set(config.batch_sizes)
    assert set(sizes[samples:]) == {config.global_batch_size}
    assert sizes[samples - 1] < config.global_batch_size
    consumed = [0]
    while consumed[-1] < samples + 500:
        consumed.append(consumed[-1] + config.batch_size_at(consumed[-1]))
    for steps in (0, 1, len(consumed) // 2, len(consumed) - 1):
        assert config.samples_of(steps) == consumed[steps]
    assert samples_of_run(config, "train") == config.samples_of(config.train_iters)


class Numbers:
    """Sample i is the number i."""

    has_loss_mask = False

    def read(self, sample):
        return Sample(np.array([sample]))

    def prefetch(self, sample):
        """Called where memory is short: then the loader finds that it had to wait for the disk."""


@pytest.mark.parametrize("consumed", [0, 8])
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_samples_follow_each_other_on_any_number_of_replicas(replicas, consumed):
    config = training(12, (4, 4, 24), micro_batch_size=2)
    loaders = [loader_of(Numbers(), config.batch_size_at, replica, replicas, consumed) for replica in range(replicas)]
    found = []
    for _ in range(5):
        batch = np.concatenate([next(loader).ids.numpy() for loader in loaders], axis=1)
        found.append(batch.ravel().tolist())
    assert [len(batch) for batch in found] == ([4, 4, 4, 8, 8] if consumed == 0 else [4, 8, 8, 12, 12])
    assert list(itertools.chain(*found)) == list(range(consumed, consumed + sum(map(len, found))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((8, 3, 100), r"from 8 by 3 at a time to global_batch_size \(16\)"),
        ((16, 2, 100), "START must be smaller"),
        ((8, 2, 0), "greater than 0"),
        ((6, 5, 100), r"a batch of rampup_batch_size \(11\) must be divisible by micro_batch_size \(2\)"),
    ],
)
def test_a_ramp_that_cannot_be_is_explained(values, message):
    with pytest.raises(ConfigError, match=message):
        small_run(training={"rampup_batch_size": values, "global_batch_size": 16, "micro_batch_size": 2})


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        (None, None),
        ([6, 6, 100], None),
        (
            [8, 1, 100],
            r"a batch of training.rampup_batch_size \(9\) must be divisible by .* x data-parallel size \(2\)",
        ),
        ([4, 2, 100], r"at least 3 micro-batches, a batch of training.rampup_batch_size \(4\) gives 2 on each of 2"),
    ],
)
def test_every_size_must_fit_the_layout(ramp, message):
    config = small_run(training={"rampup_batch_size": ramp, "global_batch_size": 12})
    if message is None:
        check_batch_sizes(config, ranks=3, replicas=2)
    else:
        with pytest.raises(ValueError, match=message):
            check_batch_sizes(config, ranks=3, replicas=2)
