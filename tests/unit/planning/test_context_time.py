"""The time that context-parallel ranks wait for each other is that of the messages that a dry run counts."""

from dataclasses import replace

import pytest

from megatron_tf.planning.counts import PartCounter
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.rates import RatedMachine
from megatron_tf.planning.time import step_time
from megatron_tf.training.dry_run.dry_run import dry_run
from tests.support.planned import LATENCY, RATE, config_of, slow_cluster

CLUSTER = slow_cluster(4)


def waiting(config, cluster):
    """Return the seconds of a step that a plan says four context-parallel ranks wait for each other."""
    counter = PartCounter()
    return step_time(PlannedLayout(config, 4), RatedMachine(cluster, counter), counter).context


@pytest.mark.parametrize(("method", "kind", "share"), [("ring", "send", 1.0), ("all_to_all", "all-to-all", 0.75)])
def test_without_overlap_ranks_wait_for_all_messages(method, kind, share):
    config = config_of((1, 1, 1), context=(4, method))
    (rank,) = dry_run(config, 4).kinds
    (sent,) = [each for each in rank.traffic if (each.axis, each.kind) == ("cp", kind)]
    expected = share * sent.bytes / RATE + sent.calls * LATENCY
    assert waiting(config, CLUSTER) == pytest.approx(expected)


def test_a_ring_is_hidden_behind_three_quarters_of_the_attention():
    ring, exchange = (config_of((1, 1, 1), context=(4, method)) for method in ("ring", "all_to_all"))
    overlapping = replace(CLUSTER, overlaps=True)
    assert waiting(exchange, overlapping) == waiting(exchange, CLUSTER)

    training, model = ring.training, ring.model
    samples, length = training.global_batch_size, training.seq_length
    # two products in forward and five in backward, of half of all pairs of a sequence's tokens, shared by four ranks
    flops = 7 * samples * model.num_layers * length**2 * model.hidden_size / 4
    hidden = waiting(ring, CLUSTER) - waiting(ring, overlapping)
    assert hidden == pytest.approx(0.75 * flops / 1e12)
    assert waiting(ring, replace(overlapping, attention_teraflops=1e-3)) == 0
