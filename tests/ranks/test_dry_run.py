"""A dry run holds, exchanges and saves what real ranks do, counted without it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from megatron_tf.checkpoint.commit import newest_checkpoint
from megatron_tf.parallel import collectives
from megatron_tf.training.dry_run.dry_run import dry_run
from megatron_tf.training.dry_run.fake_world import fake_rank
from megatron_tf.training.dry_run.observed_step import blank_batch, observe_step
from megatron_tf.training.run.checkpointing import new_record, save_state
from megatron_tf.training.step.optimizer import MOMENTS
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from megatron_tf.training.supervision.signals import SignalCatcher
from megatron_tf.training.supervision.stop_signal import StopSignal
from tests.support.layouts import layout_config

LAYOUTS = [
    ((2, 1, 1), None, False),
    ((2, 1, 1), None, True),
    ((1, 2, 1), None, False),
    ((1, 1, 2), None, False),
    ((1, 1, 3), None, False),
    ((1, 1, 4), 2, False),
    ((2, 2, 1), None, True),
    ((1, 3, 1), None, False),
    ((1, 2, 2), 1, False),
    ((2, 2, 2), None, True),
    ((2, 1, 4), 2, True),
]
"""(tensor, pipeline, data), replicas that share a copy, whether activations are sharded along the sequence."""
SCHEDULES = pytest.mark.parametrize("schedule", ["interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"])
CONTEXTS = [("ring", 3, (2, 1, 1), None), ("all_to_all", 2, (1, 1, 2), 1)]
"""(method, context-parallel ranks, (tensor, pipeline, data), replicas that share a copy)"""
COLLECTIVES = {
    "all_to_all_single": "all-to-all",
    "all_gather_single": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_reduce": "all-reduce",
}
OURS = {"_all_gather_single": "all-gather", "_reduce_scatter_single": "reduce-scatter"}


def config_of(layout, sequence_parallel, **sections):
    """Rows are split unevenly over three replicas."""
    training = {"micro_batch_size": 1, "global_batch_size": 4 * layout[2]}
    sections.setdefault("data", {"eod_mask_loss": True})
    return layout_config(layout, sequence_parallel, training=training, kernels={"pattention": "eager"}, **sections)


def real_messages(mesh, config):
    """{(kind, ranks of the group): (calls, bytes)} of a real step, counted where Python calls torch.distributed."""
    state, seen = build_state(config, mesh), Counter()
    stop_signal = StopSignal(mesh, SignalCatcher(), None)
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in COLLECTIVES.items():
            if hasattr(dist, name):
                patch.setattr(dist, name, counting(getattr(dist, name), kind, seen))
        for name, kind in OURS.items():
            patch.setattr(collectives, name, counting(getattr(collectives, name), kind, seen))
        patch.setattr(dist, "batch_isend_irecv", counting_pairs(dist.batch_isend_irecv, seen))
        for name, kind in (("send", "send"), ("recv", "receive")):
            patch.setattr(dist, name, counting(getattr(dist, name), kind, seen))
        # it calls batch_isend_irecv if there are both sends and receives
        patch.setattr(schedules, "_batch_p2p", counting_pairs(schedules._batch_p2p, seen, are_alike=True))
        train_step(state, blank_batch(config, mesh), 1e-3)
        stop_signal.agree()
    return as_pairs(seen)


def counting(collective, kind, seen):
    """`collective`, counted with the bytes of its larger side."""

    def counted(*args, group, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        add(seen, kind, group, max(tensor.numel() * tensor.itemsize for tensor in tensors))
        return collective(*args, group=group, **kwargs)

    return counted


def counting_pairs(send_and_receive, seen, are_alike=False):
    """A function that sends and receives, with its operations counted, or only those that are alike."""

    def counted(operations, *description, **options):
        if not are_alike or len({each.op for each in operations}) == 1:
            for each in operations:
                kind = "send" if each.op is dist.isend else "receive"
                add(seen, kind, each.group, each.tensor.numel() * each.tensor.itemsize)
        return send_and_receive(operations, *description, **options)

    return counted


def add(seen, kind, group, size):
    key = kind, tuple(dist.get_process_group_ranks(group))
    seen[*key, "calls"] += 1
    seen[*key, "bytes"] += size


def as_pairs(seen):
    return {key: (seen[*key, "calls"], seen[*key, "bytes"]) for key in {(kind, ranks) for kind, ranks, _ in seen}}


def ranks_of(axis, layout, shard_size, rank, context=1):
    """The ranks of a group, by arithmetic."""
    tensor, pipeline, data = layout
    share = shard_size or data
    ranks = np.arange(tensor * pipeline * data * context).reshape(pipeline, data // share, share, context, tensor)
    p, replica, d, c, t = (int(index) for index in np.argwhere(ranks == rank)[0])
    members = {
        "tp": ranks[p, replica, d, c, :],
        "cp": ranks[p, replica, d, :, t],
        "dp": ranks[p, :, :, c, t],
        "dp_cp": ranks[p, :, :, :, t],
        "dp_shard": ranks[p, replica, :, c, t],
        "dp_shard_cp": ranks[p, replica, :, :, t],
        "dp_replicate": ranks[p, :, d, c, t],
        "pp": ranks[:, replica, d, c, t],
        "tied": ranks[[0, -1], replica, d, c, t],
        "world": ranks,
    }
    return tuple(members[axis].flatten().tolist())


def dry_messages(layout, shard_size, rank, config):
    """The same of a dry run."""
    tensor, pipeline, data = layout
    context = config.parallel.context_parallel_size
    seen = Counter()
    sizes = {"tensor": tensor, "pipeline": pipeline, "data": data, "context": context, "shard_size": shard_size}
    with fake_rank(rank, **sizes) as mesh:
        for each in observe_step(build_state(config, mesh), config).counter.traffic():
            key = each.kind, ranks_of(each.axis, layout, shard_size, rank, context)
            seen[*key, "calls"] += each.calls
            seen[*key, "bytes"] += each.bytes
    return as_pairs(seen)


@pytest.mark.parametrize(("layout", "shard_size", "sequence_parallel"), LAYOUTS, ids=str)
def test_a_dry_run_exchanges_the_messages_of_real_ranks(rank_pool, layout, shard_size, sequence_parallel):
    config = config_of(layout, sequence_parallel)
    real = rank_pool.run(real_messages, *layout, config, shard_size=shard_size)
    dry = [dry_messages(layout, shard_size, rank, config) for rank in range(len(real))]
    assert dry == real


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_a_dry_run_exchanges_the_messages_of_real_ranks_in_chunks(rank_pool, sequence_parallel):
    layout = (2, 2, 1)
    config = config_of(layout, sequence_parallel, parallel={"tp_comm_overlap_chunks": 3})
    real = rank_pool.run(real_messages, *layout, config)
    assert [dry_messages(layout, None, rank, config) for rank in range(4)] == real


def context_config(method, context, layout, shard_size):
    """Chunks of four tokens."""
    parallel = {"context_parallel_size": context, "context_parallel_method": method}
    data = {"eod_mask_loss": True, "reset_attention_mask": True}
    config = with_training(config_of(layout, layout[0] > 1, data=data), precision="bf16", seq_length=8 * context)
    return replace(config, parallel=replace(config.parallel, data_parallel_shard_size=shard_size, **parallel))


@pytest.mark.parametrize(("method", "context", "layout", "shard_size"), CONTEXTS)
def test_a_dry_run_exchanges_the_messages_of_context_parallel_ranks(rank_pool, method, context, layout, shard_size):
    """And attention sends as much as docs/parallelism.md says."""
    config = context_config(method, context, layout, shard_size)
    real = rank_pool.run(real_messages, *layout, config, context=context, shard_size=shard_size)
    assert [dry_messages(layout, shard_size, rank, config) for rank in range(len(real))] == real

    activation = config.training.micro_batch_size * 8 * config.model.hidden_size // layout[0]
    passes = 4 * config.model.num_layers  # micro-batches x layers
    group = ranks_of("cp", layout, shard_size, 0, context)
    if method == "ring":
        passing = 3 * passes * (context - 1)
        size = passes * (context - 1) * 2 * activation * (2 + 2 + 4)
        assert real[0]["send", group] == real[0]["receive", group] == (passing, size)
    else:
        assert real[0]["all-to-all", group] == (4 * passes, passes * 2 * (3 + 1) * activation * 2)


def test_a_dry_run_exchanges_the_messages_of_real_ranks_in_16_bits(rank_pool):
    """With untied embeddings and activations computed again in backward."""
    layout = (2, 2, 1)
    config = config_of(layout, True, model={"untie_embeddings_and_output_weights": True}, data={})
    config = with_training(config, precision="bf16", recompute_granularity="full")
    real = rank_pool.run(real_messages, *layout, config)
    assert [dry_messages(layout, None, rank, config) for rank in range(4)] == real


@SCHEDULES
def test_a_dry_run_exchanges_the_messages_of_every_schedule(rank_pool, schedule):
    layout = (1, 2, 2)
    config = config_of(layout, False, model={"num_layers": 4}, schedule=schedule)
    real = rank_pool.run(real_messages, *layout, config)
    assert [dry_messages(layout, None, rank, config) for rank in range(4)] == real


@SCHEDULES
def test_the_peak_of_every_schedule_is_that_of_real_ranks(rank_pool, schedule):
    """Also what a split backward keeps between its halves; but not what was sent, which torch keeps to the end."""
    config = config_of((1, 2, 1), False, data={}, model={"num_layers": 4}, schedule=schedule)
    config = with_training(config, seq_length=64)
    real = rank_pool.run(measured_peak, 1, 2, 1, config)
    for kind, peak in zip(dry_run(config, 2).kinds, real, strict=True):
        sent = sum(each.bytes for each in kind.traffic if (each.axis, each.kind) == ("pp", "send"))
        assert 0.99 * peak - sent <= kind.peak_bytes <= 1.01 * peak


def with_training(config, **keys):
    return replace(config, training=replace(config.training, **keys))


def held_and_saved(mesh, config, root):
    """Bytes of the parameters and of the Adam moments of a rank, which then writes a checkpoint."""
    state = build_state(config, mesh)
    train_step(state, blank_batch(config, mesh), 1e-3)
    save_state(state, config, new_record(config, {}), root=Path(root))
    moments = [shard.tensor for moment in MOMENTS for shard in state.optimizer.moments(moment)]
    return [sum(tensor.nbytes for tensor in part) for part in ([s.tensor for s in state.shards], moments)]


@pytest.mark.parametrize(("layout", "shard_size", "sequence_parallel"), LAYOUTS, ids=str)
def test_a_dry_run_holds_and_saves_what_real_ranks_do(rank_pool, tmp_path, layout, shard_size, sequence_parallel):
    assert_holds_and_saves(rank_pool, tmp_path, layout, shard_size, config_of(layout, sequence_parallel))


def test_a_dry_run_holds_and_saves_what_the_ranks_of_a_v_do(rank_pool, tmp_path):
    """The first rank has both copies of the tied embedding, and saves one."""
    config = config_of((1, 2, 2), False, model={"num_layers": 4}, schedule="zbv")
    assert_holds_and_saves(rank_pool, tmp_path, (1, 2, 2), None, config)
    assert dry_run(config, 4).kinds[0].layers == [(0, 1), (3, 4)]


def test_a_dry_run_holds_and_saves_what_context_parallel_ranks_do(rank_pool, tmp_path):
    layout, shard_size = (1, 1, 2), 1
    config = context_config("all_to_all", 2, layout, shard_size)
    assert_holds_and_saves(rank_pool, tmp_path, layout, shard_size, config)


def assert_holds_and_saves(rank_pool, tmp_path, layout, shard_size, config):
    parallel = {"data_parallel_shard_size": shard_size}
    config = replace(config, parallel=replace(config.parallel, **parallel))
    context = config.parallel.context_parallel_size
    real = rank_pool.run(held_and_saved, *layout, config, tmp_path, context=context, shard_size=shard_size)
    found = dry_run(config, len(real))
    kinds = Counter()
    for kind in found.kinds:
        kinds[kind.stage, kind.parameter_bytes, kind.optimizer_bytes] += kind.count
    per_stage = layout[0] * layout[2] * context
    assert kinds == Counter((rank // per_stage, *held) for rank, held in enumerate(real))

    saved = newest_checkpoint(tmp_path)
    sizes = {path.name: path.stat().st_size for path in saved.iterdir()}
    assert found.checkpoint.manifest_bytes == sizes.pop("manifest.json")
    assert found.checkpoint.metadata_bytes == sizes.pop("metadata.json")
    assert found.checkpoint.files == sizes


def measured_peak(mesh, config):
    """The peak of a step, with values, on a CPU; the smallest of several.

    A thread of gloo may hold what it has sent for a moment longer than the step does.
    """
    return min(observe_step(build_state(config, mesh), config).meter.peak for _ in range(5))


@pytest.mark.parametrize(("layout", "shard_size"), [((2, 1, 2), 2), ((1, 2, 2), 2), ((1, 1, 4), 2), ((2, 2, 1), 1)])
def test_the_peak_is_that_of_real_ranks(rank_pool, layout, shard_size):
    """But for the ids of a batch, which are on the host for both."""
    config = with_training(config_of(layout, layout[0] > 1, data={}), seq_length=64, precision="bf16")
    config = replace(config, parallel=replace(config.parallel, data_parallel_shard_size=shard_size))
    real = rank_pool.run(measured_peak, *layout, config, shard_size=shard_size)
    per_stage = layout[0] * layout[2]
    for kind in dry_run(config, len(real)).kinds:
        assert kind.peak_bytes == pytest.approx(real[kind.stage * per_stage], rel=0.01)
