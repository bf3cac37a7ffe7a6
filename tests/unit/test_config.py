"""Configurations: what is read, what is refused, and what the refusal says."""

import pytest
import yaml

from megatron_tf.config import ConfigError, ParallelConfig, load_config
from megatron_tf.config.load import to_dict
from megatron_tf.errors import UserError
from megatron_tf.parallel.mesh import LayoutError, data_parallel_size
from megatron_tf.parallel.stages import partition_layers
from tests.support.training import small_run

CONTEXT_3 = "--parallel.context_parallel_size=3"
CONTEXT_4 = [
    "--parallel.context_parallel_size=4",
    "--parallel.tensor_model_parallel_size=4",
    "--parallel.sequence_parallel=true",
]
ALL_TO_ALL = "--parallel.context_parallel_method=all_to_all"
TRANSFORMER = ["--model.layer=transformer", "--model.qkv_tokens=null", "--model.proj_tokens=null"]


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
        (["--parallel.tp_comm_overlap_chunks=2"], "tp_comm_overlap_chunks needs tensor_model_parallel_size > 1"),
        (
            ["--parallel.tensor_model_parallel_size=2", "--parallel.tp_comm_overlap_chunks=2", *TRANSFORMER],
            "parallel.tp_comm_overlap_chunks needs model.layer=tokenformer: set it to 1",
        ),
        (["--parallel.reshard_after_forward=true", "--parallel.pipeline_schedule=zbv"], "choose 1f1b or interleaved"),
        ([CONTEXT_3], "seq_length (16) must be divisible by 6, the number of chunks"),
        ([CONTEXT_3, ALL_TO_ALL, "--training.seq_length=18"], "num_attention_heads (4) must be divisible by"),
        ([*CONTEXT_4, "--training.seq_length=24"], "(24) must be divisible by parallel.context_parallel_size (4) x"),
        (
            [*CONTEXT_4, ALL_TO_ALL],
            "tensor_model_parallel_size (4) under context_parallel_method all_to_all",
        ),
        ([*CONTEXT_4, "--training.attention_dropout=0.1"], "attention_dropout (0.1) needs parallel.context_parallel_"),
        ([*CONTEXT_4, "--kernels.attention=flash_attn"], "ring needs kernels.attention sdpa, but it is flash_attn"),
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
    assert data_parallel_size(8, tensor=2, pipeline=1, context=2) == 2
    with pytest.raises(LayoutError, match=r"12 rank.*tensor 2 x pipeline 1 x context 4 needs a multiple of 8"):
        data_parallel_size(12, tensor=2, pipeline=1, context=4)
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


@pytest.mark.parametrize(
    ("schedule", "ranks", "stages"),
    [("zbv", 1, 1), ("interleaved_1f1b", 1, 1), ("1f1b", 4, 4), ("zbv", 4, 8), ("interleaved_1f1b", 4, 12)],
)
def test_several_stages_need_several_ranks(schedule, ranks, stages):
    virtual = 3 if schedule == "interleaved_1f1b" else None
    keys = {"pipeline_schedule": schedule, "num_virtual_stages_per_pipeline_rank": virtual}
    assert ParallelConfig(pipeline_model_parallel_size=ranks, **keys).num_stages == stages
