"""The declared parameters are those of the module."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from megatron_tf.config import ModelConfig, RunConfig, load_config
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tokenformer.parameters import Module, Role, initial_taus, model_parameters

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


def stages(run: RunConfig) -> list[ModelConfig]:
    return [run.at_stage(number).model for number in range(len(run.growth) + 1)]


def variants(model: ModelConfig) -> list[ModelConfig]:
    """The model with two layers, tied and untied, and the plain transformer of the same trunk."""
    changes = {f"{kind}_tokens": model.token_counts(kind)[:2] for kind in model.token_kinds}
    small = dataclasses.replace(model, num_layers=min(2, model.num_layers), **changes)
    plain = dataclasses.replace(small, layer="transformer", qkv_tokens=None, proj_tokens=None)
    return [
        dataclasses.replace(config, untie_embeddings_and_output_weights=is_untied)
        for config in (small, plain)
        for is_untied in (False, True)
    ]


def built(config: ModelConfig) -> TokenFormer:
    with torch.device("meta"):
        return TokenFormer(config)


def check(config: ModelConfig) -> None:
    declared = [(parameter.name, parameter.shape) for parameter in model_parameters(config).values()]
    model = built(config)
    assert declared == [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert initial_taus(config) == {name: module.tau for name, module in model.pattentions().items()}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_declaration_is_the_module_in_name_shape_and_order(path):
    for config in stages(load_config(path)):
        check(config)
        for variant in variants(config):
            check(variant)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_parameter_knows_the_parts_of_its_name(path):
    for config in variants(load_config(path).model):
        for name, parameter in model_parameters(config).items():
            assert parameter.name == name == f"{parameter.path}.{parameter.role}"
            assert parameter.path.endswith(parameter.module)
            if parameter.layer is not None:
                assert parameter.name_in_layer(parameter.layer) == name
            assert parameter.pattern == re.sub(r"\.\d+\.", ".*.", name)


def test_every_module_and_role_is_declared():
    declared = [p for path in EXAMPLES for c in variants(load_config(path).model) for p in model_parameters(c).values()]
    assert {parameter.module for parameter in declared} == set(Module)
    assert {parameter.role for parameter in declared} == set(Role)
