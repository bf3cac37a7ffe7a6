"""Replicas that share copies in groups: one curve, each row written once, one exchange a step, bytes by formula."""

from collections import Counter
from dataclasses import replace
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
    """(calls, elements by dtype) of forward and backward of a step without tensor parallelism, and what it consists of:
    blocks, their parameters and all parameters of the stage."""
    state, calls, elements = build_state(config, mesh), Counter(), Counter()
    batch = random_batch(config, 0, mesh)
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in COLLECTIVES.items():
            if hasattr(dist, name):
                patch.setattr(dist, name, counting(getattr(dist, name), kind, calls, elements))
        forward_backward(state, batch)
    (model,) = state.stages
    layers = model.layers
    sizes = [sum(p.numel() for p in module.parameters()) for module in (layers, model)]
    return dict(calls), dict(elements), len(layers), *sizes


def counting(collective, kind, calls, elements):
    """`collective`, counted with the elements of its larger side."""

    def counted(*args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        (dtype,) = {tensor.dtype for tensor in tensors}
        calls[kind] += 1
        elements[kind, dtype] += max(tensor.numel() for tensor in tensors)
        return collective(*args, **kwargs)

    return counted


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("layout", "shard_size"), [((1, 1, 2), 2), ((1, 1, 2), 1), ((1, 1, 4), 2), ((1, 2, 2), 2)])
def test_gradients_are_exchanged_once_a_step(rank_pool, layout, shard_size):
    """And parameters are gathered once, however many micro-batches there are: blocks in 16 bits, gradients in fp32."""
    for micro_batches in (2, 4):
        training = {"micro_batch_size": 1, "global_batch_size": micro_batches * layout[2], "precision": "bf16"}
        config = layout_config(layout, training=training)
        for calls, elements, blocks, of_blocks, whole in rank_pool.run(
            exchanges, *layout, config, shard_size=shard_size
        ):
            units, expected = Counter(), {}
            if shard_size > 1:
                units.update({"all-gather": blocks + 1, "reduce-scatter": blocks + 1})
                expected |= {("all-gather", BF16): of_blocks, ("all-gather", FP32): whole - of_blocks}
                expected["reduce-scatter", FP32] = whole
            if shard_size < layout[2]:
                units["all-reduce"] = blocks + 1
                expected["all-reduce", FP32] = whole // shard_size
            assert calls == units
            assert elements == expected


RESHARDED = [((1, 1, 2), 2), ((1, 1, 4), 2), ((1, 2, 2), 2), ((2, 1, 2), 2)]
RESHARD = {"reshard_after_forward": True}
# without a pipeline all schedules run the whole model as one stage
RESHARDED_SCHEDULES = [
    *((layout, size, "1f1b") for layout, size in RESHARDED),
    *(((1, 2, 2), 2, schedule) for schedule in ("gpipe", "interleaved_1f1b")),
]


def with_parallel(config, **keys):
    return replace(config, parallel=replace(config.parallel, **keys))


@pytest.mark.parametrize(("layout", "shard_size", "schedule"), RESHARDED_SCHEDULES, ids=str)
def test_resharding_trains_the_same(rank_pool, layout, shard_size, schedule):
    sections = {"model": {"num_layers": 4}, "training": {"precision": "fp64"}}
    reference, expected = rank_pool.run(training_run, 1, 1, 1, layout_config((1, 1, 1), **sections), 6)[0]
    config = with_parallel(layout_config(layout, layout[0] > 1, schedule=schedule, **sections), **RESHARD)
    answers = rank_pool.run(training_run, *layout, config, 6, shard_size=shard_size)
    assert all(curve == answers[0][0] for curve, _ in answers), "ranks disagree"
    np.testing.assert_allclose(answers[0][0], reference, rtol=1e-9)
    for name, gradient in whole_model(layout, False, [gradients for _, gradients in answers]).items():
        assert np.linalg.norm(gradient - expected[name]) < 1e-12 * np.linalg.norm(expected[name]), name


@pytest.mark.parametrize(("layout", "shard_size"), RESHARDED[:3], ids=str)
def test_resharding_exchanges_in_every_micro_batch(rank_pool, layout, shard_size):
    """Blocks are gathered for each forward and each backward, the other parameters once in a micro-batch."""
    training = {"micro_batch_size": 1, "global_batch_size": 4 * layout[2], "precision": "bf16"}
    config = with_parallel(layout_config(layout, training=training), **RESHARD)
    for calls, elements, blocks, of_blocks, whole in rank_pool.run(exchanges, *layout, config, shard_size=shard_size):
        assert calls["reduce-scatter"] == 4 * (blocks + 1)
        assert elements["reduce-scatter", FP32] == 4 * whole
        assert elements["all-gather", BF16] == 2 * 4 * of_blocks
        assert elements["all-gather", FP32] == 4 * (whole - of_blocks)
        assert calls["all-gather"] == 4 * (2 * blocks + 1)


def measured_bytes(mesh, config):
    """(held, gathered, whole gradients): bytes of storage after a step's backward, and at its last forward."""
    state, during = build_state(config, mesh), {}

    def look(module, args, output):
        parameters = list(module.parameters())
        during["gathered"] = storage_bytes(parameters)
        during["gradients"] = storage_bytes([p.grad for p in parameters if p.grad is not None])

    (model,) = state.stages
    model.register_forward_hook(look)
    forward_backward(state, random_batch(config, 0, mesh))
    parameters = list(model.parameters())
    held = parameters + [p.grad for p in parameters]
    held += [shard.tensor for moment in MOMENTS for shard in state.optimizer.moments(moment)]
    return storage_bytes(held), during["gathered"], during["gradients"]


def storage_bytes(tensors):
    """Of the ranks' own parts, each storage once."""
    local = [local_tensor(tensor.detach()).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in local}.values())


def formula(config, layout, shard_size, stage):
    """H, P and B of docs/parallelism.md: parameters that a rank of the stage holds, those that it computes with, and
    those of these that are in blocks."""
    tensor, pipeline, _ = layout
    layers = stage_layers(config.model, pipeline, config.training.seq_length)[stage]
    with torch.device("meta"):
        shapes = [(name, p.shape) for name, p in TokenFormer(config.model, layers).named_parameters()]
    sharded = {name: parameter.is_sharded for name, parameter in model_parameters(config.model).items()}
    whole = [
        (name.startswith("layers."), shape[0] // tensor if sharded[name] else shape[0], shape[1:].numel())
        for name, shape in shapes
    ]
    held = sum(-(-rows // shard_size) * columns for _, rows, columns in whole)
    computes = sum(rows * columns for _, rows, columns in whole)
    return held, computes, sum(rows * columns for in_block, rows, columns in whole if in_block)


@pytest.mark.parametrize(
    ("layout", "shard_size", "precision"),
    [
        ((1, 1, 1), 1, "fp32"),
        ((2, 1, 1), 1, "fp32"),
        ((1, 2, 1), 1, "fp32"),
        ((1, 1, 2), 2, "fp32"),
        ((1, 1, 2), 1, "fp32"),
        ((1, 1, 4), 2, "fp32"),
        ((2, 1, 2), 2, "fp32"),
        ((1, 2, 2), 2, "fp32"),
        ((1, 1, 2), 2, "bf16"),
        ((1, 1, 2), 1, "bf16"),
        ((2, 1, 2), 2, "fp16"),
    ],
)
def test_memory_is_what_the_formula_says(rank_pool, layout, shard_size, precision):
    config = layout_config(layout, layout[0] > 1, training={"precision": precision})
    per_stage = layout[0] * layout[2]
    answers = rank_pool.run(measured_bytes, *layout, config, shard_size=shard_size)
    for rank, (held, gathered, gradients) in enumerate(answers):
        holds, computes, in_blocks = formula(config, layout, shard_size, rank // per_stage)
        assert held == 16 * holds
        if layout[2] > 1:
            each = 4 if precision == "fp32" else 2
            assert gathered == each * in_blocks + 4 * (computes - in_blocks)
        if layout[2] > 1 and precision == "fp32":  # FSDP keeps gradients that it has cast to fp32 in a place of its own
            assert gradients in (0, 4 * computes)  # 1f1b's last forward on the first stage is before a backward


def block_bytes(mesh, config):
    """(parameters of blocks, their gradients): bytes of storage of all blocks as each of them ends a forward."""
    state, seen = build_state(config, mesh), []
    layers = [layer for stage in state.stages for layer in stage.layers.values()]

    def look(module, args, output):
        parameters = [p for layer in layers for p in layer.parameters()]
        seen.append((storage_bytes(parameters), storage_bytes([p.grad for p in parameters if p.grad is not None])))

    for layer in layers:
        layer.register_forward_hook(look)
    forward_backward(state, random_batch(config, 0, mesh))
    return seen, [sum(p.numel() for p in layer.parameters()) for layer in layers]


@pytest.mark.parametrize(("layout", "shard_size"), [((1, 1, 2), 2), ((1, 2, 2), 2)], ids=str)
def test_resharding_holds_one_block_at_a_time(rank_pool, layout, shard_size):
    """A block's own hook runs while it is gathered still; the rows of its gradients stay with their ranks."""
    config = with_parallel(layout_config(layout, training={"micro_batch_size": 1}), **RESHARD)
    for seen, sizes in rank_pool.run(block_bytes, *layout, config, shard_size=shard_size):
        held = 4 * sum(sizes) // shard_size
        for parameters, gradients in seen:
            assert parameters <= held + 4 * max(sizes)
            assert gradients <= held
