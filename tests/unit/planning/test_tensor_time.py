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


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize(
    ("sequence_parallel", "during_tokens", "in_chunks"),
    [(False, (3, 5), (5, 8 + 3)), (True, (6, 6), (9, 8 + 5))],
    ids=["whole", "sequence"],
)
def test_messages_travel_during_products(sequence_parallel, during_tokens, in_chunks, chunks):
    """Those of inputs and their gradients, and of activations in chunks, all but one: (messages, numbers) of each."""
    config = config_of((RANKS, 1, 1), sequence_parallel=sequence_parallel, parallel={"tp_comm_overlap_chunks": chunks})
    overlapping = replace(CLUSTER, overlaps=True)
    hidden = waiting(config, CLUSTER) - waiting(config, overlapping)
    training, model = config.training, config.model
    activations = training.global_batch_size * training.seq_length * model.hidden_size * 2
    micro_batches = training.global_batch_size // training.micro_batch_size
    calls = during_tokens[0] * chunks + in_chunks[0] * (chunks - 1)
    size = during_tokens[1] + in_chunks[1] * (chunks - 1) / chunks
    share = (RANKS - 1) / RANKS
    assert hidden == pytest.approx(
        model.num_layers * (size * share * activations / RATE + calls * micro_batches * LATENCY)
    )
    fast = replace(overlapping, product_teraflops=1e9, memory_gigabytes_per_second=1e9, kernel_microseconds=0)
    assert waiting(config, fast) == pytest.approx(waiting(config, CLUSTER), rel=1e-3)


@pytest.mark.parametrize("chunks", [1, 4])
def test_no_more_is_hidden_than_products_take(chunks):
    """Forward's two products but a chunk of each, and in backward two products and one but a chunk of it."""
    config = config_of((RANKS, 1, 1), sequence_parallel=True, parallel={"tp_comm_overlap_chunks": chunks})
    model, training = config.model, config.training
    tokens = training.global_batch_size * training.seq_length
    rows = 3 * model.token_counts("qkv")[0] + model.token_counts("proj")[0] + model.token_counts("ffn")[0]
    flops = 4 * tokens * model.hidden_size * rows / RANKS
    seconds = waiting(config, CLUSTER) / model.num_layers / 100
    rates = {"memory_gigabytes_per_second": 1e12, "kernel_microseconds": 0, "product_teraflops": flops / seconds / 1e12}
    hidden = waiting(config, replace(CLUSTER, **rates)) - waiting(config, replace(CLUSTER, **rates, overlaps=True))
    share = (chunks - 1) / chunks
    assert hidden == pytest.approx(model.num_layers * seconds * (1 + 1.5 * share), rel=1e-6)
