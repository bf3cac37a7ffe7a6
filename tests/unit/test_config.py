"""Configurations: what is read, what is refused, and what the refusal says."""

import pytest
import yaml

from megatron_tf.config import ConfigError, load_config
from megatron_tf.config.load import to_dict
from megatron_tf.errors import UserError
from megatron_tf.parallel.mesh import LayoutError, data_parallel_size
from megatron_tf.parallel.stages import partition_layers
from tests.support.training import small_run


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(to_dict(small_run())))
    return file


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--model.hiden_size=64"], "unknown key 'model.hiden_size'; did you mean 'hidden_size'?"),
        (["--modle.num_layers=2"], "unknown key 'modle'; did you mean 'model'?"),
        (["--parallel.tensor_model_parallel_size=3"], "num_attention_heads (4) must be divisible by"),
        (["--parallel.tensor_model_parallel_size=4", "--model.proj_tokens=30"], "proj_tokens (30) must be divisible"),
        (["--parallel.pipeline_model_parallel_size=4"], "more than model.num_layers (3)"),
        (["--model.num_attention_heads=5"], "hidden_size (32) must be divisible by num_attention_heads (5)"),
        (["--training.train_iters=x"], "training.train_iters"),
        (["--parallel.sequence_parallel=true"], "sequence_parallel needs tensor_model_parallel_size > 1"),
        (["--parallel.reshard_after_forward=true", "--parallel.pipeline_schedule=zbv"], "choose 1f1b or interleaved"),
        (["training.seed"], "overrides are written --section.key=value"),
    ],
)
def test_a_mistake_is_explained(path, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert message in str(caught.value)


def test_overrides_apply_in_order(path):
    config = load_config(path, ["--training.seed=1", "--training.seed=2", "--optimizer.lr=6e-4"])
    assert (config.training.seed, config.optimizer.lr) == (2, 6e-4)


def test_a_world_that_does_not_fit_the_layout():
    assert data_parallel_size(8, tensor=2, pipeline=2) == 2
    for requested in (None, 1):
        with pytest.raises(LayoutError, match="6 rank"):
            data_parallel_size(6, tensor=2, pipeline=2, requested=requested)
    assert data_parallel_size(8, tensor=2, pipeline=1, shard_size=2) == 4
    with pytest.raises(LayoutError, match=r"4 replica\(s\) are not a multiple of .*data_parallel_shard_size \(3\)"):
        data_parallel_size(8, tensor=2, pipeline=1, shard_size=3)


def test_stages_are_balanced_with_the_head_counted():
    assert partition_layers([1.0] * 4, 2) == [range(2), range(2, 4)]
    stages = partition_layers([1.0] * 9 + [4.0], 3)
    costs = [len(stage) + (3 if stage is stages[-1] else 0) for stage in stages]
    assert max(costs) == 5
    assert [layer for stage in stages for layer in stage] == list(range(10))
    with pytest.raises(UserError, match="every stage needs a layer"):
        partition_layers([1.0], 2)
