"""Exports as transformers loads them: what they compute and generate, that they come back, and what is refused."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.checkpoint.schedule_start import ScheduleStart
from megatron_tf.commands import conversion, reshard_checkpoint, train_tokenizer
from megatron_tf.config import GrowthStage
from megatron_tf.convert.huggingface import check, tensors
from megatron_tf.convert.huggingface.check import load_export
from megatron_tf.growth.grow import grow
from tests.support import toy
from tests.support.conversion import convert, save_small_model
from tests.support.data import write_data_set

MODELS = {
    "l2_norm_gelu": {},
    "gelu_l2_norm": {"norm_activation": "gelu_l2_norm", "untie_embeddings_and_output_weights": True},
    "softmax": {"norm_activation": "softmax", "rotary_percent": 0.5},
    "tokens by layer": {"ffn_tokens": [32, 96], "qkv_tokens": [40, 24]},
}


@pytest.mark.parametrize("model, is_large", [*((model, False) for model in MODELS), ("tokens by layer", True)])
def test_export_and_import_keep_every_bit(model, is_large, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 10_000 if is_large else tensors.SHARD_BYTES)
    checkpoint = save_small_model(tmp_path, tau_scale=1.3, **MODELS[model])
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model") == 0
    assert "between megatron_tf and transformers in float32" in capsys.readouterr().out
    files = [path.name for path in (tmp_path / "model").glob("*.safetensors")]
    assert len(files) > 5 if is_large else files == ["model.safetensors"]
    assert convert("hf", "megatron_tf", tmp_path / "model", tmp_path / "back") == 0
    assert toy.same(toy.read_all(checkpoint), toy.read_all(tmp_path / "back"))
    before, after = CheckpointReader(checkpoint).record, CheckpointReader(tmp_path / "back").record
    assert before == after.with_data(tokenizer_model=before.data["tokenizer_model"])


def test_the_start_of_the_schedule_is_exported_and_imported(tmp_path):
    checkpoint = CheckpointReader(save_small_model(tmp_path))
    stage = GrowthStage(ffn_tokens=128, init="duplicate", optimizer={"lr": 1e-3})
    start = ScheduleStart(step=0, tokens=0)
    reshard(grow(checkpoint, stage), tmp_path / "grown", toy.target(1, 1))
    assert CheckpointReader(tmp_path / "grown").record.schedule_start == start
    assert convert("megatron_tf", "hf", tmp_path / "grown", tmp_path / "model") == 0
    assert convert("hf", "megatron_tf", tmp_path / "model", tmp_path / "back") == 0
    assert CheckpointReader(tmp_path / "back").record.schedule_start == start


def test_what_transformers_saves_again_is_read(exported, tmp_path):
    checkpoint, export = exported
    model = load_export(export)
    with torch.no_grad():
        model.model.norm.bias += 1
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    shutil.copy(export / "tokenizer.json", tmp_path / "tuned")
    assert convert("hf", "megatron_tf", tmp_path / "tuned", tmp_path / "back") == 0
    before, after = toy.read_all(checkpoint)["model"], toy.read_all(tmp_path / "back")["model"]
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["final_norm.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_transformers_saves_in_16_bits_is_read_exactly(exported, tmp_path, dtype):
    checkpoint, export = exported
    load_export(export, dtype).save_pretrained(tmp_path / "half")
    shutil.copy(export / "tokenizer.json", tmp_path / "half")
    assert convert("hf", "megatron_tf", tmp_path / "half", tmp_path / "back") == 0
    before, after = toy.read_all(checkpoint)["model"], toy.read_all(tmp_path / "back")["model"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(dtype).float(), after[name]) for name in before)


def test_other_types_hidden_states_and_new_models(exported):
    _, export = exported
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.bfloat16)
    outputs = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.logits.isfinite().all()
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(1, 3, 32)] * 3
    config = AutoConfig.from_pretrained(export, trust_remote_code=True)
    new = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert new.model.layers[0].ffn.key_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert new.model.layers[1].ffn.tau == pytest.approx(0.7 * 8)
    assert type(config)(token_counts=config.token_counts, num_hidden_layers=2).tau["layers.1.ffn"] == 8


def test_the_card_tells_lineage_and_loss(tmp_path):
    checkpoint = save_small_model(tmp_path)
    write_data_set(tmp_path / "data", [[i % 60 for i in range(200)]])
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model", "--data", tmp_path / "data") == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "nats a token on the first 192 tokens of data" in card
    assert "never grown" in card
    assert "60 (64 rows with padding" in card


def test_the_card_names_layers_that_were_added_and_dropped(tmp_path):
    options = {"grown": ["--insert-layers", "0,2"], "smaller": ["--drop-layers", "1"]}
    checkpoint = save_small_model(tmp_path)
    for name, change in options.items():
        assert reshard_checkpoint.main(["--load", str(checkpoint), "--save", str(tmp_path / name), *change]) == 0
        checkpoint = tmp_path / name
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model", "--skip-check") == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- step 0 (0 tokens): new layers 0, 3, by zero_key\n" in card
    assert "- step 0 (0 tokens): without layers 1, by drop_layers\n" in card


def alter_tau(write):
    """As `write_config_and_tokenizer`, with one temperature a hundredth larger."""

    def altered(checkpoint, directory, *arguments, **options):
        write(checkpoint, directory, *arguments, **options)
        config = json.loads((directory / "config.json").read_text())
        config["tau"]["layers.1.attention.proj"] *= 1.01
        (directory / "config.json").write_text(json.dumps(config))

    return altered


def test_an_export_that_computes_something_else_is_not_left_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conversion, "write_config_and_tokenizer", alter_tau(conversion.write_config_and_tokenizer))
    assert convert("megatron_tf", "hf", save_small_model(tmp_path), tmp_path / "model") == 1
    said = capsys.readouterr()
    assert "in float64" in said.out
    assert "logits differ by" in said.err
    assert not list(tmp_path.glob("*model*"))


def edit_code(write, old, new):
    """As `write_config_and_tokenizer`, with a fault in the model's code."""

    def edited(checkpoint, directory, *arguments, **options):
        write(checkpoint, directory, *arguments, **options)
        path = directory / "modeling_tokenformer.py"
        code = path.read_text()
        assert code.count(old) == 1
        path.write_text(code.replace(old, new))
        with (directory / "configuration_tokenformer.py").open("a") as file:
            file.write(f"# {new}\n")  # a process keeps the model's code as long as the configuration's is the same

    return edited


@pytest.mark.parametrize(
    "old, new, way",
    [
        (
            "cache = self._choose_cache(cache, past_key_values, use_cache)",
            "cache = DynamicCache()",
            "greedy generation",
        ),
        ("attention_mask=_simplify_mask(attention_mask)", "attention_mask=None", "generation of a left-padded batch"),
        ("is_causal=num_queries > 1", "is_causal=False", "a forward pass"),
    ],
)
def test_an_export_that_generates_something_else_is_not_left_behind(old, new, way, tmp_path, monkeypatch, capsys):
    write = edit_code(conversion.write_config_and_tokenizer, old, new)
    monkeypatch.setattr(conversion, "write_config_and_tokenizer", write)
    assert convert("megatron_tf", "hf", save_small_model(tmp_path), tmp_path / "model") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "logits differ by" in line
    assert f"{way}, more than" in line
    assert not list(tmp_path.glob("*model*"))


def test_an_export_whose_beams_keep_the_caches_of_others_is_refused(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda cache, beams: None)
    assert convert("megatron_tf", "hf", exported[0], tmp_path / "model") == 1
    assert "in beam search of a left-padded batch" in capsys.readouterr().err


@pytest.mark.parametrize("scale, dtype", [(0.0, "float32"), (30.0, "float64")])
def test_neither_ties_nor_rounding_refuse_an_export(scale, dtype, tmp_path, capsys):
    assert convert("megatron_tf", "hf", save_small_model(tmp_path, scale=scale), tmp_path / "model") == 0
    assert f"in {dtype}" in capsys.readouterr().out


def test_without_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "has_transformers", lambda: False)
    checkpoint = save_small_model(tmp_path)
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model") == 1
    assert "pip install '.[hf]' in a clone of megatron_tf, or use --skip-check" in capsys.readouterr().err
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model", "--skip-check") == 0
    assert "not compared" in capsys.readouterr().out
    assert load_export(tmp_path / "model").config.hidden_size == 32


def edit_config(**changes):
    def edit(export):
        config = json.loads((export / "config.json").read_text())
        (export / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def edit_facts(**changes):
    def edit(export):
        config = json.loads((export / "config.json").read_text())
        config["megatron_tf"]["config"]["model"] |= changes
        (export / "config.json").write_text(json.dumps(config))

    return edit


def write_index(**files):
    def edit(export):
        (export / "model.safetensors").rename(export.parent / "other.safetensors")
        (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    return edit


def cut(export):
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda export: (export / "config.json").unlink(), "it has no config.json"),
        (
            lambda export: (export / "config.json").write_text("[1]"),
            "does not belong to a model exported by megatron_tf",
        ),
        (edit_config(megatron_tf=None), "does not belong to a model exported by megatron_tf"),
        (edit_config(tau={"layers.0.ffn": 8.0}), "tau of layers.0.attention.key is missing"),
        (edit_config(tau={"layers.0.ffn": "x"}), "does not belong to a model exported by megatron_tf"),
        (
            edit_config(megatron_tf={"config": {}}),
            "does not belong to a model exported by megatron_tf: KeyError('model')",
        ),
        (edit_facts(num_layers=3, ffn_tokens=64), "tau of layers.2.attention.key is missing"),
        (edit_facts(ffn_tokens=32), "ffn.key_tokens is [64, 32], expected [32, 32]"),
        (edit_facts(untie_embeddings_and_output_weights=True), "lacks lm_head.weight"),
        (edit_facts(hidden_size=33), "hidden_size (33) must be divisible"),
        (lambda export: (export / "model.safetensors").unlink(), "holds no weights"),
        (write_index(x="../other.safetensors"), "which is not a file next to it"),
        (write_index(x="missing.safetensors"), "which is not a file next to it"),
        (cut, "ends early"),
        (lambda export: (export / "model.safetensors").write_bytes(b"\xff" * 64), "not a safetensors file"),
        (lambda export: write_another_tokenizer(export), "is not the tokenizer that"),
    ],
)
def test_a_directory_that_is_not_as_expected_is_named(spoil, message, exported, tmp_path, capsys):
    export = shutil.copytree(exported[1], tmp_path / "model")
    spoil(export)
    assert convert("hf", "megatron_tf", export, tmp_path / "back") == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "back" / "latest").exists()


def write_another_tokenizer(export):
    path = export / "tokenizer.json"
    path.write_text(path.read_text().replace("w7", "w7x"))


def test_a_place_that_is_taken_is_left_alone(exported, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert convert("megatron_tf", "hf", exported[0], tmp_path) == 1
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "mine").exists()


def test_a_plain_transformer_is_refused(tmp_path, capsys):
    options = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
    checkpoint = save_small_model(tmp_path, **options)
    for target in ("hf", "official"):
        assert convert("megatron_tf", target, checkpoint, tmp_path / target) == 1
        assert "is a plain transformer" in capsys.readouterr().err


def test_tokenizers_of_both_kinds_encode_as_ours(exported, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(exported[1], trust_remote_code=True)
    assert tokenizer("w3 w9", add_special_tokens=False)["input_ids"] == [3, 9]
    assert tokenizer.eos_token_id == 0
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"the fox {i} jumps over it, naïve café {i * 7}"}) for i in range(300))
    )
    options = ["--vocab-size", "330", "--output-prefix", str(tmp_path / "sp")]
    assert train_tokenizer.main(["--input", str(tmp_path / "text.jsonl"), *options]) == 0
    checkpoint = save_small_model(tmp_path, tokenizer=("SentencePieceTokenizer", tmp_path / "sp.model"), vocab_size=330)
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model") == 0
    assert "encodes differently" not in capsys.readouterr().out
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == (tmp_path / "sp.model").read_bytes()
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert convert("hf", "megatron_tf", tmp_path / "model", tmp_path / "back") == 0


def test_a_tokenizer_that_transformers_reads_otherwise_is_told(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "tokenizer_difference", lambda directory, tokenizer, texts: "odd text")
    assert convert("megatron_tf", "hf", exported[0], tmp_path / "model") == 0
    assert "encodes differently from megatron_tf with this tokenizer: 'odd text'" in capsys.readouterr().out
