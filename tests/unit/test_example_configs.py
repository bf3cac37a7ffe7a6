"""Every example configuration loads, and builds a model of the published size."""

from pathlib import Path

import pytest
import torch

from megatron_tf.config import load_config
from megatron_tf.model.sizes import parameter_count
from megatron_tf.model.tokenformer import TokenFormer

EXAMPLES = Path(__file__).parents[2] / "examples"
PARAMETERS = {
    "tokenformer_150m": 151_881_216,
    "tokenformer_450m": 454_166_528,
    "tokenformer_900m": 903_252_480,
    "tokenformer_1.5b": 1_587_219_456,
    "tokenformer_354m_base": 353_503_232,
    "tokenformer_757m_grown": 756_156_416,
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
