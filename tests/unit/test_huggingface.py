"""Exports as transformers loads them: what they compute and generate, that they come back, and what is refused."""

import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import megatron_tf
from megatron_tf.checkpoint import huggingface
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.inference.huggingface import check
from megatron_tf.inference.huggingface.check import load_export
from tests.support.conversion import save_small_model
from tests.support.data import write_data_set
from tests.support.models import greedy_ids
from tests.unit.checkpoint import toy
from tools import convert_checkpoint, train_tokenizer

MODELS = {
    "l2_norm_gelu": {},
    "gelu_l2_norm": {"norm_activation": "gelu_l2_norm", "untie_embeddings_and_output_weights": True},
    "softmax": {"norm_activation": "softmax", "rotary_percent": 0.5},
    "tokens by layer": {"ffn_tokens": [32, 96], "qkv_tokens": [40, 24]},
}


def convert(source, target, load, save, *options):
    return convert_checkpoint.main(
        ["--from", source, "--to", target, "--load", str(load), "--save", str(save), *map(str, options)]
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(checkpoint, its export) of a model that grew."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = save_small_model(folder, tau_scale=0.7)
    assert convert("megatron_tf", "hf", checkpoint, folder / "model") == 0
    return checkpoint, folder / "model"


@pytest.mark.parametrize("model, is_large", [*((model, False) for model in MODELS), ("tokens by layer", True)])
def test_export_and_import_keep_every_bit(model, is_large, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 10_000 if is_large else huggingface.SHARD_BYTES)
    checkpoint = save_small_model(tmp_path, tau_scale=1.3, **MODELS[model])
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model") == 0
    assert "between megatron_tf and transformers in float32" in capsys.readouterr().out
    files = [path.name for path in (tmp_path / "model").glob("*.safetensors")]
    assert len(files) > 5 if is_large else files == ["model.safetensors"]
    assert convert("hf", "megatron_tf", tmp_path / "model", tmp_path / "back") == 0
    assert toy.same(toy.read_all(checkpoint), toy.read_all(tmp_path / "back"))
    before, after = CheckpointReader(checkpoint).metadata, CheckpointReader(tmp_path / "back").metadata
    after["config"]["data"]["tokenizer_model"] = before["config"]["data"]["tokenizer_model"]
    assert before == after


def test_greedy_generation_equals_ours_alone_and_in_a_batch_of_different_lengths(exported):
    checkpoint, export = exported
    model, theirs = megatron_tf.load(checkpoint), load_export(export)
    prompts = [[5, 9, 2, 33, 7], [12, 50], [40, 41, 42]]
    ours = greedy_ids(model, prompts, 12)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for prompt, expected in zip(prompts, ours, strict=True):
        ids = theirs.generate(torch.tensor([prompt]), **settings)
        assert ids[0, len(prompt) :].tolist() == expected
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids = theirs.generate(padded, attention_mask=mask, **settings)
    assert ids[:, longest:].tolist() == ours


def test_every_query_sees_a_key_even_where_all_before_is_padding(exported):
    code = sys.modules[type(load_export(exported[1])).__module__]
    padding = torch.tensor([[False, False, True]])
    mask = code._attention_mask(3, 3, 0, padding, padding.device)
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, False, True]]


def test_padded_ids_are_never_generated(tmp_path):
    checkpoint = save_small_model(tmp_path, vocab_size=50)
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model") == 0
    model = load_export(tmp_path / "model")
    prompt = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model.model.embed_tokens.weight[50:] = 20 * model.model.embed_tokens.weight[: 64 - 50]
        assert int(model(prompt).logits[0, -1].argmax()) >= 50
    assert int(model.generate(prompt, max_new_tokens=20, do_sample=False).max()) < 50


def test_a_prompt_in_chunks_is_causal(exported):
    model = load_export(exported[1])
    ids = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = None, []
        for chunk in ids.split([5, 1, 4, 2], dim=1):
            outputs = model(chunk, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            parts.append(outputs.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


def test_a_static_cache_generates_the_same(exported):
    model = load_export(exported[1])
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    assert torch.equal(
        model.generate(prompt, **settings), model.generate(prompt, cache_implementation="static", **settings)
    )


def test_loss_gradients_and_gradient_checkpointing(exported):
    checkpoint, export = exported
    ours, theirs = megatron_tf.load(checkpoint), load_export(export).train()
    ids = torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(2))
    expected = F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    gradients = {huggingface.huggingface_name(name): p.grad for name, p in ours.transformer.named_parameters()}
    for is_checkpointed in (False, True):
        if is_checkpointed:
            theirs.gradient_checkpointing_enable()
        theirs.zero_grad()
        loss = theirs(ids, labels=ids).loss
        loss.backward()
        assert abs(loss.item() - expected.item()) < 1e-6
        for name, parameter in theirs.named_parameters():
            assert (parameter.grad - gradients[name]).norm() < 1e-5 * gradients[name].norm(), name


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


def alter_tau(write):
    """As `write_surroundings`, with one temperature a hundredth larger."""

    def altered(checkpoint, directory, *arguments):
        write(checkpoint, directory, *arguments)
        config = json.loads((directory / "config.json").read_text())
        config["tau"]["layers.1.attention.proj"] *= 1.01
        (directory / "config.json").write_text(json.dumps(config))

    return altered


def test_an_export_that_computes_something_else_is_not_left_behind(tmp_path, monkeypatch, capsys):
    name = "megatron_tf.inference.huggingface.export.write_surroundings"
    from megatron_tf.inference.huggingface import export

    monkeypatch.setattr(name, alter_tau(export.write_surroundings))
    assert convert("megatron_tf", "hf", save_small_model(tmp_path), tmp_path / "model") == 1
    said = capsys.readouterr()
    assert "in float64" in said.out
    assert "logits differ by" in said.err
    assert not list(tmp_path.glob("*model*"))


def test_without_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "has_transformers", lambda: False)
    checkpoint = save_small_model(tmp_path)
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model") == 1
    assert "pip install 'megatron_tf[hf]', or give --skip-check" in capsys.readouterr().err
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
        (lambda export: (export / "config.json").write_text("[1]"), "is not of a model that megatron_tf exported"),
        (edit_config(megatron_tf=None), "is not of a model that megatron_tf exported"),
        (edit_config(tau={"layers.0.ffn": 8.0}), "tau is not there for each projection"),
        (edit_config(tau={"layers.0.ffn": "x"}), "is not of a model that megatron_tf exported"),
        (edit_config(megatron_tf={"config": {}}), "is not of a model that megatron_tf exported: KeyError('model')"),
        (edit_facts(num_layers=3, ffn_tokens=64), "tau is not there for each projection"),
        (edit_facts(ffn_tokens=32), "ffn.key_tokens is [64, 32], expected [32, 32]"),
        (edit_facts(untie_embeddings_and_output_weights=True), "lacks lm_head.weight"),
        (edit_facts(hidden_size=33), "hidden_size (33) must be divisible"),
        (lambda export: (export / "model.safetensors").unlink(), "holds no weights"),
        (write_index(x="../other.safetensors"), "which is no file beside it"),
        (write_index(x="missing.safetensors"), "which is no file beside it"),
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
    assert "is there already" in capsys.readouterr().err
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
    assert "encodes otherwise" not in capsys.readouterr().out
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == (tmp_path / "sp.model").read_bytes()
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert convert("hf", "megatron_tf", tmp_path / "model", tmp_path / "back") == 0


def test_a_tokenizer_that_transformers_reads_otherwise_is_told(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "tokenizer_difference", lambda directory, tokenizer: "odd text")
    assert convert("megatron_tf", "hf", exported[0], tmp_path / "model") == 0
    assert "encodes otherwise than megatron_tf with this tokenizer: 'odd text'" in capsys.readouterr().out
