"""Old and new rows in one step: every norm against a loop over rows, and every layout against one process."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from megatron_tf.layers.linear import MLP
from megatron_tf.layers.pattention import Pattention
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.step.step import forward_backward, train_step
from tests.support.layouts import CASES, layout_config
from tests.support.rows import LR, generations_of, grown_state, inspected_step, trained
from tests.support.training import random_batch, whole_gradients

MESH = Mesh(torch.device("cpu"))
TRANSFORMER = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
RUNS = {
    **{norm: {"model": {"norm_activation": norm}} for norm in ("l2_norm_gelu", "gelu_l2_norm", "softmax")},
    "transformer": {"model": TRANSFORMER},
    "selective recomputation": {"training": {"recompute_granularity": "selective"}},
    "full recomputation": {"training": {"recompute_granularity": "full"}},
    "clipped": {"optimizer": {"clip_grad": 1e-3}},
}


def weights_by_hand(module, x):
    """P [T, N] in float64, by the formulas of the paper."""
    x = x.detach().flatten(0, -2).double()
    if isinstance(module, MLP):
        return nn.functional.gelu(x @ module.up.weight.detach().double().t())
    scores = x @ module.key_tokens.detach().double().t()
    if module.norm.is_logarithmic:
        return module.tau * scores.softmax(-1)
    if module.norm.name == "gelu_l2_norm":
        fired = nn.functional.gelu(scores)
        return module.tau * fired / fired.norm(dim=-1, keepdim=True)
    return nn.functional.gelu(module.tau * scores / scores.norm(dim=-1, keepdim=True))


def contributions_by_hand(config):
    """Name of the values -> norm of each row's contribution to the first micro-batch, averaged over tokens."""
    state, found = grown_state(MESH, config), {}

    def record(module, inputs, name, values):
        if name not in found:
            weights = weights_by_hand(module, inputs[0])
            rows = zip(weights.t(), values.detach().double(), strict=True)
            found[name] = [float(torch.outer(weight, value).norm()) / len(weights) ** 0.5 for weight, value in rows]

    for path, module in state.model.named_modules():
        if isinstance(module, Pattention | MLP):
            is_mlp = isinstance(module, MLP)
            name = f"{path}.down.weight" if is_mlp else f"{path}.value_tokens"
            values = module.down.weight if is_mlp else module.value_tokens
            module.register_forward_pre_hook(lambda m, x, name=name, values=values: record(m, x, name, values))
    forward_backward(state, random_batch(config, 0, MESH))
    return found


def expected_rows(config):
    """(growth, kind, layer) -> [gradient, update, contribution, dead, tokens], each summed row by row."""
    state = grown_state(MESH, config)
    batch = random_batch(config, 0, MESH)
    forward_backward(state, batch)
    gradients = whole_gradients(state)
    state = grown_state(MESH, config)
    before = {shard.name: shard.tensor.clone() for shard in state.shards}
    train_step(state, batch, LR)
    after = {shard.name: shard.tensor for shard in state.shards}
    contributions, generations, found = contributions_by_hand(config), generations_of(config.model), {}
    for name, parameter in model_parameters(config.model).items():
        if parameter.layer is None:
            continue
        start = 0
        median = sorted(contributions.get(name, [0.0]))[(parameter.shape[0] - 1) // 2 if name in contributions else 0]
        for run in generations.runs(name, parameter.shape[0]):
            sums = found.setdefault((run.generation.growth, parameter.kind, parameter.layer), [0.0] * 5)
            for row in range(start, start + run.count):
                sums[0] += float((torch.from_numpy(gradients[name][row]).double() ** 2).sum())
                sums[1] += float(((after[name][row] - before[name][row]) ** 2).sum())
                if name in contributions:
                    sums[2] += contributions[name][row] ** 2
                    sums[3] += contributions[name][row] <= 0.01 * median
                    sums[4] += 1
            start += run.count
    return {key: [*map(math.sqrt, sums[:3]), *sums[3:]] for key, sums in found.items()}


def as_table(rows):
    return {
        (row.growth, row.kind, row.layer): [row.grad_norm, row.update_norm, row.contribution, row.dead, row.tokens]
        for row in rows
    }


@pytest.mark.parametrize("sections", RUNS.values(), ids=list(RUNS))
def test_they_are_sums_over_rows(sections):
    training = {"precision": "fp64"} | sections.get("training", {})
    config = layout_config((1, 1, 1), **(copy.deepcopy(sections) | {"training": training}))
    expected, found = expected_rows(config), as_table(inspected_step(MESH, config))
    assert found.keys() == expected.keys()
    kinds = 3
    assert len(found) == kinds * (2 * 3 + 1) or config.model.layer == "transformer"
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-9), key
    assert sum(values[3] for values in found.values()) > 0


@pytest.mark.parametrize("layout, sequence_parallel", CASES)
def test_every_layout_measures_the_same(rank_pool, layout, sequence_parallel):
    expected = as_table(inspected_step(MESH, layout_config((1, 1, 1))))
    answers = rank_pool.run(inspected_step, *layout, layout_config(layout, sequence_parallel))
    assert all(answer == answers[0] for answer in answers), "ranks disagree"
    found = as_table(answers[0])
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-4), key


@pytest.mark.parametrize("granularity", ["none", "full"])
@pytest.mark.parametrize("layout, sequence_parallel", [((1, 1, 1), False), ((2, 2, 1), True), ((2, 1, 2), False)])
def test_inspection_changes_no_bit_of_the_training(rank_pool, layout, sequence_parallel, granularity):
    config = layout_config(layout, sequence_parallel, training={"recompute_granularity": granularity})
    plain, inspected = (rank_pool.run(trained, *layout, config, is_inspected) for is_inspected in (False, True))
    for (results, tensors), (other_results, other_tensors) in zip(plain, inspected, strict=True):
        assert results == other_results
        assert all(np.array_equal(*pair) for pair in zip(tensors, other_tensors, strict=True))


@pytest.mark.parametrize("layout", [(1, 1, 2), (2, 1, 2)], ids=str)
def test_rows_of_which_each_replica_has_a_copy_count_once(rank_pool, layout):
    expected = as_table(inspected_step(MESH, layout_config((1, 1, 1))))
    found = as_table(rank_pool.run(inspected_step, *layout, layout_config(layout), shard_size=1)[0])
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-4), key
