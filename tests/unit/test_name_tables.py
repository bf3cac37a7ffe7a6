"""Names of parameters in other formats: each is told once, and leads back to the parameter."""

import dataclasses

import pytest

from megatron_tf.config import ModelConfig
from megatron_tf.convert.huggingface.tensors import HUGGINGFACE
from megatron_tf.convert.official.names import OFFICIAL
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support.conversion import SMALL


@pytest.mark.parametrize("is_untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("table", [OFFICIAL, HUGGINGFACE], ids=["official", "huggingface"])
def test_a_name_in_another_format_leads_back_to_its_parameter(table, is_untied):
    model = dataclasses.replace(ModelConfig(**SMALL), untie_embeddings_and_output_weights=is_untied)
    declared = list(model_parameters(model).values())
    found = table.parameters(model)
    assert list(found.values()) == declared
    assert list(found) == [table.of(parameter, model.num_layers) for parameter in declared]
