"""Every example configuration loads, and builds a model of the published size."""

from pathlib import Path

import pytest
import torch

from megatron_tf.config import load_config
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tokenformer.sizes import layer_flops, parameter_count
from megatron_tf.training.step.schedule import learning_rate

EXAMPLES = Path(__file__).parents[2] / "examples"
PARAMETERS = {
    "tokenformer_150m": 151_881_216,
    "tokenformer_450m": 454_166_528,
    "tokenformer_900m": 903_252_480,
    "tokenformer_1.5b": 1_587_219_456,
    "tokenformer_13b": 13_679_339_520,
    "tokenformer_175b": 174_564_335_616,
    "tokenformer_354m_base": 353_503_232,
    "tokenformer_757m_grown": 756_156_416,
    "growth_354m_to_757m": 353_503_232,
    "growth_124m_to_1.4b": 123_569_664,
}
SCHEDULES = {  # the paper's sizes
    "growth_354m_to_757m": [353_503_232, 756_156_416],
    "growth_124m_to_1.4b": [123_569_664, 354_190_848, 756_745_728, 1_399_653_888],
}


RUNS = [path for path in sorted(EXAMPLES.rglob("*.yaml")) if path.parent.name not in ("growth_study", "kubernetes")]
"""The configurations of runs; those of the growth study are checked in test_growth_study.py."""


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_it_builds_a_model_of_the_published_size(path):
    config = load_config(path).model
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in TokenFormer(config).parameters())
    assert built == parameter_count(config)
    if path.parent.name == "configs":
        assert built == PARAMETERS[path.stem]


def test_every_published_model_has_a_configuration():
    assert {path.stem for path in (EXAMPLES / "configs").glob("*.yaml")} == PARAMETERS.keys()


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_tensor_parallelism_takes_less_than_a_tenth_of_the_time_of_the_products(path):
    """On paper, by the arithmetic of docs/parallelism.md: an H100 does 1,000 operations in the time of one byte."""
    config = load_config(path)
    for number in range(len(config.growth) + 1):
        stage = config.at_stage(number)
        ranks, width = stage.parallel.tensor_model_parallel_size, stage.model.hidden_size
        sent = 32 * width * (ranks - 1) / ranks
        operations = 3 * layer_flops(stage.model, 0, stage.training.seq_length) / ranks
        assert 1000 * sent < 0.1 * operations, f"stage {number}"


def test_the_arithmetic_of_the_documentation_is_right():
    model = load_config(EXAMPLES / "configs" / "tokenformer_1.5b.yaml").model
    operations = 3 * layer_flops(model, 0, 2048)
    assert operations == 96 * 1536**2 + 6 * 1536 * 2048
    shares = [round(1000 * 32 * 1536 * (ranks - 1) / operations, 2) for ranks in (2, 4, 8)]
    page = (EXAMPLES.parent / "docs" / "parallelism.md").read_text()
    assert f"| 1,536 (1.5B) | {' | '.join(f'{share:.2f}' for share in shares)} |" in page


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_through_the_published_sizes(name):
    config = load_config(EXAMPLES / "configs" / f"{name}.yaml")
    stages = [config.at_stage(number).model for number in range(len(config.growth) + 1)]
    assert [parameter_count(model) for model in stages] == SCHEDULES[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_stage_has_a_warm_up_and_a_cosine_at_the_rate_of_the_official_recipe(name):
    config = load_config(EXAMPLES / "configs" / f"{name}.yaml")
    starts = [0, *(stage.at_step for stage in config.growth)]
    ends = [*starts[1:], config.training.train_iters]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        length = end - start
        optimizer = config.at_stage(number).optimizer
        left = config.training.train_iters - start
        rates = [learning_rate(optimizer, step, train_iters=left) for step in range(length)]
        warmup = length // 100
        assert rates[0] == pytest.approx(6e-4 / warmup)
        assert rates[warmup - 1 : warmup + 1] == [6e-4, 6e-4] == [max(rates)] * 2
        middle = warmup + (length - warmup) // 2
        assert rates[middle] == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-3)
        assert rates[-1] == pytest.approx(6e-5, rel=1e-4)
        assert number == 0 or config.growth[number - 1].adam_state == "reset"


def test_the_phases_of_the_recipe_keep_the_tokens_of_a_step_and_start_when_the_rate_decays():
    config = load_config(EXAMPLES / "recipes" / "annealing_and_long_context.yaml")
    phases = [config.at_stage(0, phase).training for phase in range(len(config.data.phases) + 1)]
    assert [training.seq_length for training in phases] == [2048, 2048, 16384]
    assert len({training.seq_length * training.global_batch_size for training in phases}) == 1
    first = config.data.phases[0].at_step
    total = config.training.train_iters
    rates = [learning_rate(config.optimizer, step, train_iters=total) for step in (first - 1, first, first + 1)]
    assert rates[0] == config.optimizer.lr >= rates[1] > rates[2]


def test_the_recipe_for_chat_data_fits_the_model_that_it_loads():
    chat = load_config(EXAMPLES / "recipes" / "finetune_chat.yaml")
    grown = load_config(EXAMPLES / "configs" / "growth_354m_to_757m.yaml")
    assert chat.checkpoint.load == grown.checkpoint.save
    assert chat.model == grown.at_stage(len(grown.growth)).model
