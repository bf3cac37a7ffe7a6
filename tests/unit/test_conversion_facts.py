"""What no tensor tells survives a conversion, or is refused: rotary embeddings, epsilon, heads."""

import inspect
import json
import re
import shutil

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch

import megatron_tf
from megatron_tf import generate
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import convert_checkpoint
from megatron_tf.convert.huggingface import configuration
from megatron_tf.convert.huggingface.check import load_export
from megatron_tf.convert.huggingface.template import configuration_tokenformer
from megatron_tf.inference.tokenizer import load_tokenizer
from tests.support.conversion import save_small_model
from tests.support.data import write_tokenizer

UNUSUAL = {"rotary_base": 500000.0, "rotary_percent": 0.5, "layernorm_epsilon": 1e-3}
PADDED = {"vocab_size": 60, "make_vocab_size_divisible_by": 128}


def convert(source, target, load, save, *options):
    return convert_checkpoint.main(
        ["--from", source, "--to", target, "--load", str(load), "--save", str(save), *map(str, options)]
    )


def options_of(facts):
    return [part for key, value in facts.items() for part in (f"--{key.replace('_', '-')}", value)]


def logits(model):
    ids = torch.randint(60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids)


FROM_OFFICIAL = ["--num-attention-heads", 4, "--norm-activation", "l2_norm_gelu"]


@pytest.mark.parametrize("key", UNUSUAL)
def test_what_an_official_file_cannot_hold_is_refused_without_its_option(tmp_path, capsys, key):
    checkpoint = save_small_model(tmp_path, **PADDED, **{key: UNUSUAL[key]})
    assert convert("megatron_tf", "official", checkpoint, tmp_path / "off") == 1
    error = capsys.readouterr().err
    assert f"{key} {UNUSUAL[key]:g}, which an official file can't hold" in error
    assert f"give --{key.replace('_', '-')} {UNUSUAL[key]:g} here" in error
    assert convert("megatron_tf", "official", checkpoint, tmp_path / "off", *options_of({key: 0.125})) == 1
    assert not (tmp_path / "off").exists()


def test_what_an_official_file_cannot_hold_survives_the_round_trip_with_options(tmp_path):
    checkpoint = save_small_model(tmp_path, **PADDED, **UNUSUAL)
    told = options_of(UNUSUAL)
    assert convert("megatron_tf", "official", checkpoint, tmp_path / "off", *told) == 0
    tokenizer = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", tmp_path / "tokenizer.json"]
    file = tmp_path / "off" / "pytorch_model.bin"
    assert convert("official", "megatron_tf", file, tmp_path / "back", *FROM_OFFICIAL, *tokenizer, *told) == 0
    assert torch.equal(logits(megatron_tf.load(checkpoint)), logits(megatron_tf.load(tmp_path / "back")))


def test_official_weights_are_imported_without_a_tokenizer_at_hand(tmp_path, capsys):
    checkpoint = save_small_model(tmp_path, **PADDED)
    assert convert("megatron_tf", "official", checkpoint, tmp_path / "off") == 0
    file, run = tmp_path / "off" / "pytorch_model.bin", tmp_path / "back"
    assert convert("official", "megatron_tf", file, run, *FROM_OFFICIAL, "--vocab-size", 60) == 0
    assert torch.equal(logits(megatron_tf.load(checkpoint)), logits(megatron_tf.load(run)))
    command = [str(run), "--prompt", "w3", "--max-new-tokens", "2", "--temperature", "0"]
    assert generate.main(command) == 1
    assert "--tokenizer-model" in capsys.readouterr().err
    assert generate.main([*command, "--tokenizer-model", str(tmp_path / "tokenizer.json")]) == 0
    other = write_tokenizer(tmp_path / "other.json", 59)
    assert generate.main([*command, "--tokenizer-model", str(other)]) == 1


@pytest.mark.parametrize("size", [0, -3, 300])
def test_a_vocabulary_of_another_size_is_refused(tmp_path, capsys, size):
    checkpoint = save_small_model(tmp_path, **PADDED)
    assert convert("megatron_tf", "official", checkpoint, tmp_path / "off") == 0
    file = tmp_path / "off" / "pytorch_model.bin"
    assert convert("official", "megatron_tf", file, tmp_path / "back", *FROM_OFFICIAL, "--vocab-size", size) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    checkpoint = save_small_model(folder, tau_scale=0.7, rotary_percent=1.0)
    assert convert("megatron_tf", "hf", checkpoint, folder / "model", "--skip-check") == 0
    return folder / "model"


EDITS = {
    "rotary_base": {"rotary_base": 500000.0},
    "rotary_percent": {"rotary_percent": 0.25},
    "layer_norm_eps": {"layer_norm_eps": 0.1},
    "norm_activation": {"norm_activation": "gelu_l2_norm"},
    "num_attention_heads": {"num_attention_heads": 8},
    "tau": {"tau": None},
    "absent keys": dict.fromkeys(["rotary_percent", "rotary_base", "layer_norm_eps", "norm_activation", "tau"], ...),
    "untied": {"tie_word_embeddings": False},
    "tokens": {"token_counts": {"qkv": [32, 32], "proj": [24, 24], "ffn": [64, 48]}},
    "rows": {"vocab_size": 80},
    "layers": {"num_hidden_layers": 10**9},
    "step": {"megatron_tf": {"training": {"step": -7}}},
    "infinite step": {"megatron_tf": {"training": {"step": float("inf")}}},
}


def edit(export, folder, changes):
    """A copy whose config.json has other values; `...` takes a key away."""
    copy = folder / "edited"
    copy.mkdir()
    for path in export.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key)
        elif key == "megatron_tf":
            config[key]["training"] |= value["training"]
        else:
            config[key] = value
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("changes", EDITS.values(), ids=EDITS.keys())
def test_an_edited_config_is_read_as_transformers_reads_it_or_refused(exported, tmp_path, capsys, changes):
    edited = edit(exported, tmp_path, changes)
    code = convert("hf", "megatron_tf", edited, tmp_path / "back")
    if code:
        error = capsys.readouterr().err.strip()
        assert re.fullmatch(r"error: .*(config\.json|edited).*", error)
        assert not (tmp_path / "back").exists()
    else:
        with torch.no_grad():
            theirs = logits(lambda ids: load_export(edited)(ids, use_cache=False).logits)
        assert (logits(megatron_tf.load(tmp_path / "back")) - theirs).abs().max() < 2e-5
    refused = {"untied", "tokens", "rows", "layers", "step", "infinite step"}
    assert (code == 1) == (next(name for name, value in EDITS.items() if value is changes) in refused)


def test_absent_keys_are_taken_as_in_the_code_that_travels_with_an_export():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(
            configuration_tokenformer.TokenFormerConfig.__init__
        ).parameters.items()
    }
    for theirs, default in configuration._KEYS.values():
        assert defaults[theirs] == default
    assert defaults["vocab_size"] == configuration.VOCAB_SIZE
    assert defaults["max_position_embeddings"] == configuration.MAX_POSITIONS
    assert defaults["tie_word_embeddings"] is True


def test_the_length_of_samples_is_that_of_config_json(exported, tmp_path):
    edited = edit(exported, tmp_path, {"max_position_embeddings": 32})
    assert convert("hf", "megatron_tf", edited, tmp_path / "back") == 0
    assert CheckpointReader(tmp_path / "back").record.seq_length == 32


def with_own_end(tmp_path, eod_token="w7"):
    """A small checkpoint whose run names the end of a document: id 7, in place of the file's own id 0."""
    tokenizer = "HFTokenizer", write_tokenizer(tmp_path / "tokenizer.json", 60)
    return save_small_model(tmp_path, tokenizer=tokenizer, eod_token=eod_token)


def end_of(checkpoint):
    """The end of a document as `generate` and `evaluate` take it."""
    return load_tokenizer(megatron_tf.load(checkpoint)).eod


def test_the_end_of_a_document_that_a_run_names_goes_through_hugging_face_and_back(tmp_path):
    checkpoint = with_own_end(tmp_path)
    assert end_of(checkpoint) == 7
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "hf", "--skip-check") == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == 7
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["eos_token"] == "w7"
    assert convert("hf", "megatron_tf", tmp_path / "hf", tmp_path / "back") == 0
    (tmp_path / "tokenizer.json").unlink()
    shutil.rmtree(tmp_path / "hf")
    assert end_of(tmp_path / "back") == 7


def test_an_export_and_an_import_can_name_another_end_of_a_document(tmp_path, capsys):
    checkpoint = with_own_end(tmp_path, None)
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "hf", "--skip-check", "--eod-token", "w9") == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 9
    assert convert("hf", "megatron_tf", tmp_path / "hf", tmp_path / "back", "--eod-token", "w8") == 0
    assert end_of(tmp_path / "back") == 8
    assert convert("hf", "megatron_tf", tmp_path / "hf", tmp_path / "none", "--eod-token", "nothing") == 1
    assert "has no token 'nothing': give another as --eod-token" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_official_weights_are_imported_with_the_end_of_a_document_that_is_named(tmp_path, capsys, has_tokenizer):
    checkpoint = save_small_model(tmp_path, **PADDED)
    file, path = tmp_path / "off" / "pytorch_model.bin", tmp_path / "tokenizer.json"
    assert convert("megatron_tf", "official", checkpoint, tmp_path / "off") == 0
    known = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", path] if has_tokenizer else ["--vocab-size", 60]
    end = ["--eod-token", "w5"]
    assert convert("official", "megatron_tf", file, tmp_path / "back", *FROM_OFFICIAL, *known, *end) == 0
    assert load_tokenizer(megatron_tf.load(tmp_path / "back"), path).eod == 5
    if has_tokenizer:
        assert convert("official", "megatron_tf", file, tmp_path / "n", *FROM_OFFICIAL, *known, "--eod-token", "x") == 1
        assert "has no token 'x'" in capsys.readouterr().err


def test_an_export_that_cannot_hold_the_end_of_a_document_says_so(tmp_path, capsys):
    tokenizer = "HFTokenizer", write_tokenizer(tmp_path / "tokenizer.json", 60)
    checkpoint = save_small_model(tmp_path, tokenizer=tokenizer, eod_token="w7", **PADDED)
    assert convert("megatron_tf", "official", checkpoint, tmp_path / "off") == 0
    assert "import it with --eod-token 'w7'" in capsys.readouterr().out
