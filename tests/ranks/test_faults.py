"""What is non-finite is skipped, named and counted, on every layout, and changes nothing."""

import pytest
import torch

from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.layouts import layout_config
from tests.support.training import random_batch

VICTIM = "layers.1.ffn.key_tokens"


def poisoned_run(mesh, config, poison):
    """What was non-finite in four steps, the second one's gradient poisoned on one rank, and the last parameters."""
    state = build_state(config, mesh)
    take, found, poisoned = state.optimizer._take_tensors, [], []

    def take_poison():
        gradients = take()
        for shard, gradient in zip(state.shards, gradients, strict=True):
            if shard.name == VICTIM and mesh.rank("tp") == mesh.rank("dp") == 0:
                gradient[-1, 0] = poison
                poisoned.append(True)
        return gradients

    for step in (0, 0, 1, 2):
        state.optimizer._take_tensors = take_poison if len(found) == 1 else take
        found.append(train_step(state, random_batch(config, step, mesh), 1e-3).nonfinite)
    return found, bool(poisoned), state.optimizer.num_steps, {s.name: s.tensor.clone().numpy() for s in state.shards}


def plain_run(mesh, config):
    """The same without the poisoned step."""
    state = build_state(config, mesh)
    for step in (0, 1, 2):
        train_step(state, random_batch(config, step, mesh), 1e-3)
    return {s.name: s.tensor.clone().numpy() for s in state.shards}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 2), (2, 2, 2)], ids=str)
def test_a_gradient_that_is_not_finite_is_skipped_and_named(rank_pool, layout, poison):
    config = layout_config(layout, layout[0] > 1, training={"micro_batch_size": 6, "global_batch_size": 24})
    answers = rank_pool.run(poisoned_run, *layout, config, poison)
    expected = rank_pool.run(plain_run, *layout, config)
    culprit = [poisoned for _, poisoned, _, _ in answers].index(True)
    for (found, _, num_steps, parameters), unpoisoned in zip(answers, expected, strict=True):
        assert found == [{}, {VICTIM: culprit}, {}, {}]
        assert num_steps == 3
        assert all((parameters[name] == unpoisoned[name]).all() for name in unpoisoned)


def nan_loss(mesh, config):
    state = build_state(config, mesh)
    before = [shard.tensor.clone() for shard in state.shards]
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            if name == "final_norm.bias":
                parameter.fill_(float("inf"))
    result = train_step(state, random_batch(config, 0, mesh), 1e-3)
    same = [torch.equal(a, s.tensor) for a, s in zip(before, state.shards, strict=True) if s.name != "final_norm.bias"]
    return result.nonfinite, all(same)


@pytest.mark.parametrize("layout, first_of_last_stage", [((1, 1, 1), 0), ((2, 2, 1), 2)], ids=str)
def test_a_loss_that_is_not_finite_is_skipped(rank_pool, layout, first_of_last_stage):
    answers = rank_pool.run(nan_loss, *layout, layout_config(layout))
    assert all(answer == ({"loss": first_of_last_stage}, True) for answer in answers)
