"""Every example configuration loads, and builds a model of the published size."""

from pathlib import Path

import pytest
import torch

from megatron_tf.config import load_config
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tokenformer.sizes import parameter_count

EXAMPLES = Path(__file__).parents[2] / "examples"
PARAMETERS = {
    "tokenformer_150m": 151_881_216,
    "tokenformer_450m": 454_166_528,
    "tokenformer_900m": 903_252_480,
    "tokenformer_1.5b": 1_587_219_456,
    "tokenformer_354m_base": 353_503_232,
    "tokenformer_757m_grown": 756_156_416,
    "growth_354m_to_757m": 353_503_232,
    "growth_124m_to_1.4b": 123_569_664,
}
SCHEDULES = {  # the paper's sizes
    "growth_354m_to_757m": [353_503_232, 756_156_416],
    "growth_124m_to_1.4b": [123_569_664, 354_190_848, 756_745_728, 1_399_653_888],
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_it_builds_a_model_of_the_published_size(path):
    config = load_config(path).model
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in TokenFormer(config).parameters())
    assert built == parameter_count(config)
    if path.parent.name == "configs":
        assert built == PARAMETERS[path.stem]


def test_every_published_model_has_a_configuration():
    assert {path.stem for path in (EXAMPLES / "configs").glob("*.yaml")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_through_the_published_sizes(name):
    config = load_config(EXAMPLES / "configs" / f"{name}.yaml")
    stages = [config.at_stage(number).model for number in range(len(config.growth) + 1)]
    assert [parameter_count(model) for model in stages] == SCHEDULES[name]
