"""AdamW by generations of rows against textbook AdamW with a count of updates for each moment of each row."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generation, Generations, Run
from megatron_tf.config import OptimizerConfig
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.step.optimizer import MOMENTS, Optimizer
from tests.support.textbook_adamw import BETAS, DECAY, EPS, GENERATIONS, textbook
from tests.support.training import small_run

NAME = "layers.0.ffn.key_tokens"


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def optimizer_of(start, first_row, generations):
    declared = model_parameters(small_run().model)
    parameter = torch.nn.Parameter(start[first_row:].clone())
    shard = RowShard(NAME, tuple(start.shape), first_row, len(start), parameter.detach(), True)
    config = OptimizerConfig(lr=1.0, clip_grad=0, weight_decay=DECAY, adam_beta2=BETAS[1], adam_eps=EPS)
    optimizer = Optimizer(
        parameters=[parameter],
        shards=[shard],
        declared={NAME: declared[NAME]},
        config=config,
        mesh=Mesh(torch.device("cpu")),
    )
    optimizer.generations = generations
    return optimizer, parameter


@pytest.mark.parametrize("first_row", [0, 1, 4, 13])
def test_rows_of_each_generation_follow_textbook_adamw(first_row):
    counts = range(1, len(GENERATIONS) + 1)  # each generation has another number of rows
    runs = [Run(count, generation) for count, generation in zip(counts, GENERATIONS.values(), strict=True)]
    rows, steps = sum(counts), 6
    start, gradients = draw(rows, 3), draw(steps, rows, 3).flip(0)
    first, second = draw(2, rows, 3).flip(1) * torch.tensor([0.1, 0.01])[:, None, None]
    second = second.abs()
    rates = [0.01, 0.02, 0.03, 0.02, 0.01, 0.005]
    optimizer, parameter = optimizer_of(start, first_row, Generations.of_runs({NAME: runs}))
    for moment, values in zip(MOMENTS, (first, second), strict=True):
        optimizer.moments(moment)[0].tensor.copy_(values[first_row:])
    for gradient, rate in zip(gradients, rates, strict=True):
        parameter.grad = gradient[first_row:].clone()
        optimizer.step(rate)
    low, expected = 0, []
    for run in runs:
        part = slice(low, low + run.count)
        expected.append(
            textbook(
                start[part],
                (first[part], second[part]),
                run.generation,
                gradients=gradients[:, part],
                rates=rates,
            )
        )
        low += run.count
    found = parameter.detach(), *(optimizer.moments(moment)[0].tensor for moment in MOMENTS)
    for one, parts in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(parts)[first_row:], rtol=1e-12, atol=1e-14)
    # two counts of updates for each row, of which frozen rows have had none
    for before, after in zip(runs, optimizer.generations.runs(NAME, rows), strict=True):
        done = 0 if before.generation.is_frozen else steps
        assert after.generation.exp_avg_steps == before.generation.exp_avg_steps + done
        assert after.generation.exp_avg_sq_steps == before.generation.exp_avg_sq_steps + done


def test_the_first_update_of_new_rows_has_the_size_of_the_learning_rate():
    """With the old rows' count it would be 0.45 of it at these betas, and 3.2 times it with a beta2 of 0.999."""
    runs = [Run(2, Generation(exp_avg_steps=10**6, exp_avg_sq_steps=10**6)), Run(2, Generation(growth=1))]
    optimizer, parameter = optimizer_of(torch.zeros(4, 3, dtype=torch.float64), 0, Generations.of_runs({NAME: runs}))
    parameter.grad = torch.full((4, 3), 2.0, dtype=torch.float64)
    optimizer.step(0.5)
    torch.testing.assert_close(parameter.detach()[2:], torch.full((2, 3), -0.5, dtype=torch.float64))
    too_small = 0.5 * (1 - BETAS[0]) / math.sqrt(1 - BETAS[1])
    torch.testing.assert_close(parameter.detach()[:2], torch.full((2, 3), -too_small, dtype=torch.float64))


def test_runs_are_merged_and_tensors_of_the_first_generation_are_not_listed():
    old, new = Generation(exp_avg_steps=3, exp_avg_sq_steps=3), Generation(growth=1)
    generations = Generations.of_runs({"a": [Run(4, old)], "b": [Run(1, old), Run(0, new), Run(2, old), Run(3, new)]})
    assert generations.table == (old, new)
    assert generations.rows == {"b": ((0, 3), (1, 3))}
    assert generations.runs("a", 4) == [Run(4, old)]
    assert generations.runs("b", 6) == [Run(3, old), Run(3, new)]
    assert list(generations.slices("a", 1, 4)) == [(slice(0, 3), 0)]
    assert list(generations.slices("b", 2, 5)) == [(slice(0, 1), 0), (slice(1, 3), 1)]
    assert list(generations.slices("b", 4, 4)) == []


def test_only_what_one_count_describes_is_original():
    plain = Generation(exp_avg_steps=3, exp_avg_sq_steps=3)
    assert Generations.original(3).are_original
    assert Generations.of_runs({"a": [Run(4, plain)]}) == Generations.original(3)
    for change in ({"growth": 1}, {"exp_avg_steps": 2}, {"step_scale": 0.5}, {"lr_scale": 0.5}, {"rewarmup_iters": 2}):
        assert not Generations.of_runs({"a": [Run(4, replace(plain, **change))]}).are_original
    assert not Generations.of_runs({"a": [Run(4, plain), Run(1, replace(plain, growth=1))]}).are_original


def test_generations_of_another_model_are_refused():
    generations = Generations.of_runs({"a": [Run(2, Generation())], "b": [Run(3, Generation(growth=1))]})
    generations.check_rows({"a": 2, "b": 3}, "file")
    with pytest.raises(CheckpointError, match=r"file: generations\.rows of b cover 3 of its 4 rows"):
        generations.check_rows({"a": 2, "b": 4}, "file")
    with pytest.raises(CheckpointError, match=r"file: generations\.rows names b, which is not a parameter"):
        generations.check_rows({"a": 2}, "file")
