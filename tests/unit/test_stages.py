"""Stages of growth that do not fit the ranks are refused before the first step."""

from types import SimpleNamespace

import pytest
import torch

from megatron_tf.config import ConfigError, RunConfig, parse_config, to_dict
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.run.stages import check_stages
from tests.support.training import small_run

ALONE = Mesh(torch.device("cpu"))


def run_with(*stages, **sections):
    growth = [{"at_step": 3 + number, **stage} for number, stage in enumerate(stages)]
    values = to_dict(small_run(checkpoint={"save": "run"}, **sections))
    return parse_config(RunConfig, values | {"growth": growth}, "test")


def restored(mesh, stage):
    """A run on these ranks that has reached a stage."""
    return SimpleNamespace(state=SimpleNamespace(mesh=mesh), stage=stage, phases=0, record=None)


@pytest.mark.parametrize(
    "stages, message",
    [
        (
            [{"ffn_tokens": 96, "tensor_model_parallel_size": 2}],
            r"growth\[0\]: the world has 1 rank\(s\), but the layout",
        ),
        ([{"ffn_tokens": 96}, {"ffn_tokens": 128, "pipeline_model_parallel_size": 3}], r"growth\[1\]: the world has 1"),
    ],
)
def test_a_layout_that_needs_other_ranks_is_named_with_its_stage(stages, message):
    with pytest.raises(ConfigError, match=message):
        check_stages(run_with(*stages), restored(ALONE, 0))


def test_a_batch_too_small_for_the_replicas_of_a_stage_is_named(rank_pool):
    answers = rank_pool.run(check, 2, 1, 1)
    expected = "growth[0]: training.global_batch_size (1) must be divisible by training.micro_batch_size (1)"
    assert all(answer.startswith(expected) for answer in answers), answers


def check(mesh):
    training = {"global_batch_size": 1, "micro_batch_size": 1}
    config = run_with(
        {"ffn_tokens": 96, "tensor_model_parallel_size": 1},
        parallel={"tensor_model_parallel_size": 2},
        training=training,
    )
    try:
        check_stages(config, restored(mesh, 0))
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_stages_that_are_behind_the_run_are_not_looked_at():
    check_stages(run_with({"ffn_tokens": 96, "tensor_model_parallel_size": 2}), restored(ALONE, 1))
