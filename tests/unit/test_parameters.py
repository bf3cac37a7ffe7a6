"""The declared parameters are those of the module, and nothing else in the package knows how they are named."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from megatron_tf.config import ModelConfig, RunConfig, load_config
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tokenformer.initial_values import normal_rows
from megatron_tf.tokenformer.parameters import Module, Role, initial_taus, model_parameters
from tests.support.training import PLAIN, STRONG, small_run

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if path.parent.name not in ("growth_study", "kubernetes")
]
NAMES_OF_OURS = re.compile(  # (?<![\w.-]) leaves names of other programs alone, such as model.layers.3
    r"""
    (?<![\w.-])(layers|embedding|final_norm|head|(attention|ffn)(_norm)?)\.[\w({[*]  # the front of a name
    | ^\.?(layers|embedding|final_norm|head|attention|ffn)\.$             # the same, in an f-string or in startswith
    | (?<!\w)(key|value)_tokens\b
    | (?<![\w.-])(query|key|value|proj|gate|up|down|\w+_norm)\.(weight|bias)\b
    | ^\.?query$ | ^\.(key|value|proj|ffn|gate|up|down|weight|bias)\.?$       # the end of one
    """,
    re.VERBOSE,
)
TEMPLATE = {  # travels with an export, and runs without the package
    "megatron_tf/convert/huggingface/template/configuration_tokenformer.py",
    "megatron_tf/convert/huggingface/template/modeling_tokenformer.py",
}


def stages(run: RunConfig) -> list[ModelConfig]:
    return [run.at_stage(number).model for number in range(len(run.growth) + 1)]


def variants(model: ModelConfig) -> list[ModelConfig]:
    """The model with two layers, tied and untied, and plain transformers of the same trunk."""
    changes = {f"{kind}_tokens": model.token_counts(kind)[:2] for kind in model.token_kinds}
    small = dataclasses.replace(model, num_layers=min(2, model.num_layers), **changes)
    plain = dataclasses.replace(small, **PLAIN)
    strong = dataclasses.replace(small, **STRONG)
    return [
        dataclasses.replace(config, untie_embeddings_and_output_weights=is_untied)
        for config in (small, plain, strong)
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


def test_layers_of_different_numbers_of_tokens_are_declared_as_they_are_built():
    check(small_run(model={"qkv_tokens": [8, 16, 24], "ffn_tokens": [12, 24, 36]}).model)
    for keys in (PLAIN, STRONG):
        check(small_run(model={**keys, "ffn_tokens": [12, 24, 36]}).model)


@pytest.mark.parametrize("key", ["norm", "mlp", "qk_norm"])
def test_each_choice_of_the_plain_transformer_is_declared_as_it_is_built(key):
    check(small_run(model={**PLAIN, key: STRONG[key]}).model)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_parameter_knows_the_parts_of_its_name(path):
    for config in variants(load_config(path).model):
        for name, parameter in model_parameters(config).items():
            assert parameter.name == name == f"{parameter.path}.{parameter.role}"
            assert parameter.path.endswith(parameter.module)
            if parameter.layer is not None:
                assert parameter.name_in_layer(parameter.layer) == name
            assert parameter.pattern == re.sub(r"\.\d+\.", ".*.", name)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, ["attention.proj.value_tokens", "ffn.value_tokens"]),
        (PLAIN, ["attention.proj.weight", "ffn.down.weight"]),
        (STRONG, ["attention.proj.weight", "ffn.down.weight"]),
    ],
)
def test_the_initial_size_of_what_writes_to_the_residual_stream_is_a_choice(keys, names):
    model = small_run(model=keys).model
    chosen = dataclasses.replace(model, output_init_method_std=1e-3)
    published, small = (model_parameters(config) for config in (model, chosen))
    changed = [name for name in published if published[name].initial != small[name].initial]
    assert changed == [f"layers.{layer}.{name}" for layer in range(model.num_layers) for name in names]
    for name in changed:
        assert published[name].initial.std == pytest.approx(2 / model.num_layers / model.hidden_size**0.5)
        assert small[name].initial_rows(1, 0, 256)[:8].std() == pytest.approx(1e-3, rel=0.3)


def test_every_module_and_role_is_declared():
    declared = [p for path in EXAMPLES for c in variants(load_config(path).model) for p in model_parameters(c).values()]
    assert {parameter.module for parameter in declared} == set(Module)
    assert {parameter.role for parameter in declared} == set(Role)


def is_name_of_ours(text: str) -> bool:
    """Whether a text is a parameter's name, a part of one, or a pattern for it."""
    return NAMES_OF_OURS.search(text.replace("\\", "")) is not None


def literals(path: Path) -> list[tuple[int, str]]:
    """(line, text) of every string in a file that is not documentation."""
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    ]


def test_no_other_file_knows_how_parameters_are_named():
    found, num_files = [], 0
    for folder in ("megatron_tf", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            where = str(path.relative_to(ROOT))
            if where.startswith("megatron_tf/tokenformer/") or where in TEMPLATE:
                continue
            num_files += 1
            found += [f"{where}:{line}: {text!r}" for line, text in literals(path) if is_name_of_ours(text)]
    assert not found, "\n".join(found)
    assert num_files > 100


@pytest.mark.parametrize(
    "text",
    [
        "layers.",
        "layers.0.ffn",
        r"^layers\.(\d+)",
        ".key_tokens",
        "value_tokens",
        "embedding.weight",
        "embedding.",
        "final_norm.",
        "final_norm.bias",
        "head.weight",
        "attention.query",
        ".ffn.",
        "ffn.down.weight",
        "ffn.gate.weight",
        "attention_norm.weight",
        "query_norm.weight",
        "proj.weight",
        "query",
        ".weight",
    ],
)
def test_the_scan_knows_names_of_ours(text):
    assert is_name_of_ours(text)


@pytest.mark.parametrize(
    "text",
    [
        "embedding",
        "qkv",
        "model.layers.3.mlp",
        "sequential.2.attention.query.key_param_tokens",
        "sequential.0.word_embeddings.weight",
        "lm_head.weight",
        "the layers. What",
        "tau of the attention. More",
    ],
)
def test_the_scan_leaves_names_of_others_alone(text):
    assert not is_name_of_ours(text)


def test_initial_values_are_those_of_the_seed_whatever_torch_takes_by_default():
    options = {"seed": 3, "start": 60, "stop": 70, "columns": 5, "std": 0.1}
    expected = normal_rows("w", **options)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = normal_rows("w", **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
