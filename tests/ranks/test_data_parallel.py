"""Replicas that share copies in groups: one curve, each row written once, one exchange a step, bytes by formula."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_tf.model.parallelize import stage_layers
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.sharding import local_tensor
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.run.checkpointing import new_record, restore_state, save_state
from megatron_tf.training.run.resumable import open_resumable
from megatron_tf.training.step.optimizer import MOMENTS
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import forward_backward
from tests.support.layouts import layout_config, whole_model
from tests.support.training import random_batch, training_run

TOKENIZER = {"type": "none"}
LAYOUTS = [((1, 1, 2), 1), ((1, 1, 4), 2), ((1, 2, 2), 1), ((2, 1, 2), 1)]
"""(tensor, pipeline, data), replicas that share a copy."""


def curve_and_checkpoint(mesh, config, root):
    """As training_run; and a checkpoint of a new state, which is read again."""
    answer = training_run(mesh, config, 6)
    save_state(build_state(config, mesh), config, new_record(config, TOKENIZER), root=Path(root))
    again = build_state(config, mesh)
    before = [shard.tensor.clone() for shard in again.shards]
    for shard in again.shards:
        shard.tensor.zero_()
    one = layout_config((1, 1, 1))
    restore_state(again, config=one, tokenizer=TOKENIZER, resumable=open_resumable(one, root))
    assert all(torch.equal(a, shard.tensor) for a, shard in zip(before, again.shards, strict=True))
    return answer


@pytest.mark.parametrize(("layout", "shard_size"), LAYOUTS, ids=str)
def test_any_sharing_trains_the_same(rank_pool, tmp_path, layout, shard_size):
    reference, expected = rank_pool.run(training_run, 1, 1, 1, layout_config((1, 1, 1)), 6)[0]
    config = layout_config(layout, layout[0] > 1)
    answers = rank_pool.run(curve_and_checkpoint, *layout, config, tmp_path, shard_size=shard_size)
    assert all(curve == answers[0][0] for curve, _ in answers), "ranks disagree"
    np.testing.assert_allclose(answers[0][0], reference, rtol=1e-5)
    for name, gradient in whole_model(layout, False, [gradients for _, gradients in answers]).items():
        assert np.linalg.norm(gradient - expected[name]) < 1e-5 * np.linalg.norm(expected[name]), name


COLLECTIVES = {
    "all_gather_single": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_reduce": "all-reduce",
}
"""Functions of torch.distributed, of several versions -> what they do."""


def exchanges(mesh, config):
    """{collective: (calls, elements)} of forward and backward of a step, on a layout without tensor parallelism."""
    state, seen = build_state(config, mesh), Counter()
    batch = random_batch(config, 0, mesh)
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in COLLECTIVES.items():
            if hasattr(dist, name):
                patch.setattr(dist, name, counting(getattr(dist, name), kind, seen))
        forward_backward(state, batch)
    return dict(seen), len(state.model.layers) + 1, sum(p.numel() for p in state.model.parameters())


def counting(collective, kind, seen):
    """`collective`, counted with the elements of its larger side; what is exchanged must be fp32."""

    def counted(*args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        seen[kind, "calls"] += 1
        seen[kind, "elements"] += max(tensor.numel() for tensor in tensors)
        return collective(*args, **kwargs)

    return counted


@pytest.mark.parametrize(("layout", "shard_size"), [((1, 1, 2), 2), ((1, 1, 2), 1), ((1, 1, 4), 2), ((1, 2, 2), 2)])
def test_gradients_are_exchanged_once_a_step(rank_pool, layout, shard_size):
    """And parameters are gathered once, however many micro-batches there are; in fp32, whatever activations are."""
    for micro_batches in (2, 4):
        training = {"micro_batch_size": 1, "global_batch_size": micro_batches * layout[2], "precision": "bf16"}
        config = layout_config(layout, training=training)
        for seen, units, parameters in rank_pool.run(exchanges, *layout, config, shard_size=shard_size):
            expected = {}
            for name in ("all-gather", "reduce-scatter") if shard_size > 1 else ():
                expected |= {(name, "calls"): units, (name, "elements"): parameters}
            if shard_size < layout[2]:
                expected |= {("all-reduce", "calls"): units, ("all-reduce", "elements"): parameters // shard_size}
            assert seen == expected


def measured_bytes(mesh, config):
    """(held, gathered, whole gradients): bytes of storage after a step's backward, and at its last forward."""
    state, during = build_state(config, mesh), {}

    def look(module, args, output):
        parameters = list(module.parameters())
        during["gathered"] = storage_bytes(parameters)
        during["gradients"] = storage_bytes([p.grad for p in parameters if p.grad is not None])

    state.model.register_forward_hook(look)
    forward_backward(state, random_batch(config, 0, mesh))
    parameters = list(state.model.parameters())
    held = parameters + [p.grad for p in parameters]
    held += [shard.tensor for moment in MOMENTS for shard in state.optimizer.moments(moment)]
    return storage_bytes(held), during["gathered"], during["gradients"]


def storage_bytes(tensors):
    """Of the ranks' own parts, each storage once."""
    local = [local_tensor(tensor.detach()).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in local}.values())


def formula(config, layout, shard_size, stage):
    """H and P of docs/parallelism.md: parameters that a rank of the stage holds, and those that it computes with."""
    tensor, pipeline, _ = layout
    layers = stage_layers(config.model, pipeline, config.training.seq_length)[stage]
    with torch.device("meta"):
        shapes = [(name, p.shape) for name, p in TokenFormer(config.model, layers).named_parameters()]
    sharded = {name: parameter.is_sharded for name, parameter in model_parameters(config.model).items()}
    whole = [(shape[0] // tensor if sharded[name] else shape[0], shape[1:].numel()) for name, shape in shapes]
    return sum(-(-rows // shard_size) * columns for rows, columns in whole), sum(rows * c for rows, c in whole)


@pytest.mark.parametrize(
    ("layout", "shard_size"),
    [
        ((1, 1, 1), 1),
        ((2, 1, 1), 1),
        ((1, 2, 1), 1),
        ((1, 1, 2), 2),
        ((1, 1, 2), 1),
        ((1, 1, 4), 2),
        ((2, 1, 2), 2),
        ((1, 2, 2), 2),
    ],
)
def test_memory_is_what_the_formula_says(rank_pool, layout, shard_size):
    config = layout_config(layout, layout[0] > 1)
    per_stage = layout[0] * layout[2]
    answers = rank_pool.run(measured_bytes, *layout, config, shard_size=shard_size)
    for rank, (held, gathered, gradients) in enumerate(answers):
        holds, computes = formula(config, layout, shard_size, rank // per_stage)
        assert held == 16 * holds
        if layout[2] > 1:
            assert gathered == 4 * computes
            assert gradients in (0, 4 * computes)  # 1f1b's last forward on the first stage is before a backward
