"""The time that tensor-parallel ranks wait for each other, by the formulas of docs/parallelism.md."""

from dataclasses import replace

import pytest

from megatron_tf.planning.counts import PartCounter
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.rates import RatedMachine, sent_bytes
from megatron_tf.planning.time import step_time
from megatron_tf.training.dry_run.dry_run import dry_run
from tests.support.planned import LATENCY, RATE, config_of, slow_cluster

RANKS = 2
CLUSTER = slow_cluster(RANKS, product_teraflops=1e-3)  # products take longer than any message


def waiting(config, cluster):
    """Return the seconds of a step that a plan says tensor-parallel ranks wait for each other."""
    counter = PartCounter()
    return step_time(PlannedLayout(config, RANKS), RatedMachine(cluster, counter), counter).tensor


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_without_overlap_ranks_wait_for_all_messages(sequence_parallel):
    config = config_of((RANKS, 1, 1), sequence_parallel=sequence_parallel)
    (rank,) = dry_run(config, RANKS).kinds
    sent = [each for each in rank.traffic if each.axis == "tp"]
    expected = sum(sent_bytes(each, RANKS) / RATE + each.calls * LATENCY for each in sent)
    # two messages of a few bytes, the norm and the agreement to stop, belong to the update
    assert waiting(config, CLUSTER) == pytest.approx(expected - 2 * LATENCY, rel=1e-3)


@pytest.mark.parametrize(("sequence_parallel", "calls", "size"), [(False, 3, 5), (True, 6, 6)], ids=str)
def test_inputs_and_their_gradients_travel_during_products(sequence_parallel, calls, size):
    config = config_of((RANKS, 1, 1), sequence_parallel=sequence_parallel)
    overlapping = replace(CLUSTER, overlaps=True)
    hidden = waiting(config, CLUSTER) - waiting(config, overlapping)
    training, model = config.training, config.model
    activations = training.global_batch_size * training.seq_length * model.hidden_size * 2
    micro_batches = training.global_batch_size // training.micro_batch_size
    share = (RANKS - 1) / RANKS
    assert hidden == pytest.approx(
        model.num_layers * (size * share * activations / RATE + calls * micro_batches * LATENCY)
    )
    fast = replace(overlapping, product_teraflops=1e9, memory_gigabytes_per_second=1e9, kernel_microseconds=0)
    assert waiting(config, fast) == pytest.approx(waiting(config, CLUSTER), rel=1e-3)
