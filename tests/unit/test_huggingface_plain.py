"""Plain transformers exported as Llama and Qwen3: what transformers' own code computes, and what is refused."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM

from megatron_tf.checkpoint import interface
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.commands import conversion
from megatron_tf.config import GrowthStage
from megatron_tf.convert.huggingface import tensors
from megatron_tf.growth.grow import grow
from tests.support import textbook, toy
from tests.support.conversion import convert, save_small_model
from tests.support.training import PLAIN, STRONG

QWEN = {**STRONG, "rotary_percent": 1.0, "rotary_base": 500.0, "layernorm_epsilon": 1e-3}
LLAMA = {**QWEN, "qk_norm": False}
UNTIED = {"untie_embeddings_and_output_weights": True}
MODELS = {"llama": LLAMA, "llama untied": LLAMA | UNTIED, "qwen3": QWEN, "qwen3 untied": QWEN | UNTIED}
IDS = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(0))


def export(checkpoint, target, *options):
    assert convert("megatron_tf", "hf", checkpoint, target, *options) == 0


def parameters_of(checkpoint):
    return {name: values.double() for name, values in toy.read_all(checkpoint)["model"].items()}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_own_code_computes_the_formulas(name, tmp_path, capsys):
    checkpoint = save_small_model(tmp_path, **MODELS[name])
    export(checkpoint, tmp_path / "model")
    assert "between megatron_tf and transformers in float32" in capsys.readouterr().out
    assert not list((tmp_path / "model").glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False).eval()
    assert type(model) is (Qwen3ForCausalLM if "qwen3" in name else LlamaForCausalLM)
    assert model.config.tie_word_embeddings == ("untied" not in name)
    config = CheckpointReader(checkpoint).record.model
    expected = textbook.logits(config, parameters_of(checkpoint), IDS, {})
    with torch.no_grad():
        found = model(IDS).logits
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"transformers' own `{type(model).__name__}`" in card
    assert "trust_remote_code" not in card


def test_large_weights_are_compared_by_the_largest_logit(tmp_path):
    export(save_small_model(tmp_path, scale=30.0, **LLAMA), tmp_path / "model")


def test_files_and_blocks_of_any_size_hold_the_same(tmp_path, monkeypatch):
    checkpoint = save_small_model(tmp_path, **QWEN)
    export(checkpoint, tmp_path / "whole")
    monkeypatch.setattr(tensors, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(interface, "BLOCK_BYTES", 300)
    export(checkpoint, tmp_path / "parts", "--skip-check")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 5
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(values, parts[name]) for name, values in whole.items())


def test_a_grown_model_is_exported(tmp_path):
    source = CheckpointReader(save_small_model(tmp_path, **QWEN))
    stage = GrowthStage(hidden_multiple=2, ffn_tokens=80, num_layers=3, layer_init="copy_zero")
    reshard(grow(source, stage), tmp_path / "grown", toy.target(1, 1))
    export(tmp_path / "grown", tmp_path / "model")
    expected = textbook.logits(source.record.model, parameters_of(source.directory), IDS, {})
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(IDS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def with_another_base(write):
    """As `write_config_and_tokenizer`, with another rotary base."""

    def altered(checkpoint, directory, *arguments, **options):
        write(checkpoint, directory, *arguments, **options)
        config = json.loads((directory / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] *= 1.01
        (directory / "config.json").write_text(json.dumps(config))

    return altered


def test_an_export_that_computes_something_else_is_not_left_behind(tmp_path, monkeypatch, capsys):
    write = conversion.write_config_and_tokenizer
    monkeypatch.setattr(conversion, "write_config_and_tokenizer", with_another_base(write))
    assert convert("megatron_tf", "hf", save_small_model(tmp_path, **LLAMA), tmp_path / "model") == 1
    assert "logits differ by" in capsys.readouterr().err
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**LLAMA, "norm": "layernorm"}, "as Llama only with norm: rmsnorm"),
        ({**QWEN, "mlp": "gelu"}, "as Qwen3 only with mlp: swiglu"),
        ({**LLAMA, "rotary_percent": 0.5}, "as Llama only with rotary_percent: 1.0"),
        ({**LLAMA, "ffn_tokens": [64, 96]}, "as Llama only with the same ffn_tokens in every layer"),
        (PLAIN, "as Llama only with norm: rmsnorm, mlp: swiglu, rotary_percent: 1.0"),
    ],
)
def test_what_transformers_does_not_have_is_refused(keys, message, tmp_path, capsys):
    assert convert("megatron_tf", "hf", save_small_model(tmp_path, **keys), tmp_path / "model") == 1
    said = capsys.readouterr().err
    assert said.rstrip().endswith(message)
    assert "is a plain transformer that transformers does not have" in said
    assert not (tmp_path / "model").exists()


def test_an_import_is_refused_in_one_line(tmp_path, capsys):
    export(save_small_model(tmp_path, **LLAMA), tmp_path / "model")
    assert convert("hf", "megatron_tf", tmp_path / "model", tmp_path / "back") == 1
    assert "config.json belongs to a plain transformer: only exports of TokenFormers" in capsys.readouterr().err
