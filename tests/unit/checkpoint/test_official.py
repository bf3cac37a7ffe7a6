"""The official implementation's weights in and out, against its fixtures, and what is refused."""

import math
import os
import shutil

import pytest
import torch

import megatron_tf
from megatron_tf.checkpoint import interface
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import convert_checkpoint, reshard_checkpoint
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support import toy
from tests.support.data import write_tokenizer
from tests.support.golden import CASES, golden_case

HEADS = 4


def official_tensors(case):
    """The fixture's parameters as the official code saves them."""
    _, tensors, _ = golden_case(case)
    return {name.removeprefix("param/"): value for name, value in tensors.items() if name.startswith("param/")}


def convert(source, target, load, save, *options):
    return convert_checkpoint.main(
        ["--from", source, "--to", target, "--load", str(load), "--save", str(save), *map(str, options)]
    )


def facts(folder, norm="l2_norm_gelu", vocab_size=250):
    """The options that say what an official file does not."""
    path = write_tokenizer(folder / "tokenizer.json", vocab_size)
    known = ["--num-attention-heads", HEADS, "--norm-activation", norm]
    return [*known, "--tokenizer-type", "HFTokenizer", "--tokenizer-model", path]


def import_tensors(folder, tensors, *options):
    """The exit code of importing a file of `tensors`, and where the checkpoint is."""
    torch.save(tensors, folder / "pytorch_model.bin")
    options = options or facts(folder)
    return convert("official", "megatron_tf", folder / "pytorch_model.bin", folder / "run", *options), folder / "run"


@pytest.mark.parametrize("case", CASES)
def test_an_imported_file_gives_the_official_logits_and_comes_back_bit_for_bit(case, tmp_path, monkeypatch):
    monkeypatch.setattr(interface, "BLOCK_BYTES", 1000)  # several blocks a tensor
    config, fixture, _ = golden_case(case)
    tensors = official_tensors(case)
    code, run = import_tensors(tmp_path, tensors, *facts(tmp_path, config.norm_activation))
    assert code == 0
    model = megatron_tf.load(run)
    assert model.metadata["model"]["make_vocab_size_divisible_by"] == 128
    with torch.no_grad():
        assert (model(fixture["input_ids"]) - fixture["logits"]).abs().max() < 2e-5
    assert convert("megatron_tf", "official", run, tmp_path / "back") == 0
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name].view(torch.int32), tensors[name].view(torch.int32)) for name in tensors)


def test_an_untied_head_comes_along(tmp_path):
    tensors = official_tensors(CASES[0])
    tensors["sequential.6.final_linear.weight"] = torch.randn(256, 64)
    code, run = import_tensors(tmp_path, tensors)
    assert code == 0
    assert torch.equal(megatron_tf.load(run).transformer.head.weight, tensors["sequential.6.final_linear.weight"])


@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_rotary_frequencies_of_gpt_neox_are_left_out_if_they_are_the_models(factor, tmp_path, capsys):
    tensors = official_tensors(CASES[0])
    config, _, _ = golden_case(CASES[0])
    turned = int(0.25 * config.hidden_size / config.num_attention_heads)
    for layer in (2, 3):
        frequencies = factor / 10000 ** (torch.arange(0, turned, 2) / turned)
        tensors[f"sequential.{layer}.attention.rotary_emb.inv_freq"] = frequencies.half()
    code, _ = import_tensors(tmp_path, tensors)
    assert code == (0 if factor == 1.0 else 1)
    assert factor == 1.0 or "sequential.2.attention.rotary_emb.inv_freq is not of heads" in capsys.readouterr().err


def test_growth_by_zero_keys_is_refused_and_that_which_restores_the_root_is_not(tmp_path, capsys):
    _, run = import_tensors(tmp_path, official_tensors(CASES[0]))
    grow = ["--grow", "qkv=128,proj=128,ffn=512", "--verify"]
    for init in ("zero_key", "duplicate", "rotated_key"):
        options = ["--load", str(run), "--save", str(tmp_path / init), "--growth-init", init, *grow]
        assert reshard_checkpoint.main(options) == 0
    assert convert("megatron_tf", "official", tmp_path / "zero_key", tmp_path / "refused") == 1
    assert "has tau 8; the official code takes 11.3137" in capsys.readouterr().err
    assert not list(tmp_path.glob("*refused*"))
    for init in ("duplicate", "rotated_key"):
        assert convert("megatron_tf", "official", tmp_path / init, tmp_path / f"{init}_kept") == 0


def test_tokens_that_differ_by_layer_are_refused(tmp_path, capsys):
    _, run = import_tensors(tmp_path, official_tensors(CASES[0]))
    options = ["--load", str(run), "--save", str(tmp_path / "grown"), "--grow", "ffn@0=512", "--growth-init", "random"]
    assert reshard_checkpoint.main(options) == 0
    assert convert("megatron_tf", "official", tmp_path / "grown", tmp_path / "back") == 1
    assert "256 to 512 ffn tokens; the official code has one number" in capsys.readouterr().err


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


FIRST = "sequential.2.attention.query.key_param_tokens"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop("sequential.3.mlp.value_param_tokens"), "lacks sequential.3.mlp.value_param_tokens"),
        (drop("sequential.5.norm.bias"), "lacks sequential.5.norm.bias"),
        (drop(FIRST), f"it lacks {FIRST}"),
        (lambda tensors: tensors.clear() or tensors.update(x=torch.ones(1)), "not an official TokenFormer"),
        (put("sequential.9.extra", torch.ones(2)), "also has sequential.9.extra, which this model does not have"),
        (put("sequential.5.norm.bias", torch.ones(63)), "norm.bias is [63], expected [64]"),
        (put("sequential.3.mlp.key_param_tokens", torch.ones(128, 64)), "is [128, 64], expected [256, 64]"),
        (put(FIRST, torch.ones(64)), "is [64], expected two dimensions"),
        (put(FIRST, torch.ones(64, 64).double()), "is torch.float64, expected fp32, bf16, fp16"),
        (put(FIRST, torch.ones(64, 64).int()), "is torch.int32, expected fp32, bf16, fp16"),
        (put("sequential.0.word_embeddings.weight", torch.ones(200, 64)), "has 200 rows, which the tokenizer's 250"),
        (
            put("sequential.0.word_embeddings.weight", torch.ones(50304, 64)),
            "the tokenizer's 250 ids are not padded to",
        ),
        (put("args", {"lr": 1}), "holds more than tensors: 'args' is dict"),
    ],
)
def test_a_file_that_is_not_as_expected_is_named(spoil, message, tmp_path, capsys):
    tensors = official_tensors(CASES[0])
    spoil(tensors)
    code, run = import_tensors(tmp_path, tensors)
    error = capsys.readouterr().err
    assert code == 1
    assert "pytorch_model.bin" in error
    assert message in error
    assert not run.exists()


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("write", [lambda path: torch.save({"x": Evil()}, path), lambda path: path.write_bytes(b"PK")])
def test_no_code_in_a_file_runs(write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pytorch_model.bin")
    options = facts(tmp_path)
    assert convert("official", "megatron_tf", tmp_path / "pytorch_model.bin", tmp_path / "run", *options) == 1
    error = capsys.readouterr().err
    assert "can't be read as plain tensors" in error
    assert "weights_only" not in error  # torch recommends to do without it
    assert not (tmp_path / "owned").exists()


def test_files_of_the_old_kind_are_read(tmp_path):
    tensors = official_tensors(CASES[0])
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert convert("official", "megatron_tf", tmp_path / "old.bin", tmp_path / "run", *facts(tmp_path)) == 0


@pytest.mark.parametrize("option", ["--num-attention-heads", "--norm-activation", "--tokenizer-type"])
def test_what_the_file_does_not_tell_is_asked_for(option, tmp_path, capsys):
    options = facts(tmp_path)
    place = options.index(option)
    code, _ = import_tensors(tmp_path, official_tensors(CASES[0]), *options[:place], *options[place + 2 :])
    assert code == 1
    assert f"does not contain {option}" in capsys.readouterr().err


def test_damage_found_while_writing_leaves_nothing(tmp_path, capsys):
    _, run = import_tensors(tmp_path, official_tensors(CASES[0]))
    [file] = run.glob("step_*/model-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert convert("megatron_tf", "official", run, tmp_path / "back") == 1
    assert "damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("*back*"))


def test_a_disk_that_is_too_small(tmp_path, capsys, monkeypatch):
    _, run = import_tensors(tmp_path, official_tensors(CASES[0]))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1 << 20))
    assert convert("megatron_tf", "official", run, tmp_path / "back") == 1
    assert "make room" in capsys.readouterr().err
    assert not list(tmp_path.glob("*back*"))


def test_one_side_is_ours(tmp_path):
    with pytest.raises(SystemExit) as exit_of_usage:
        convert("official", "hf", tmp_path, tmp_path)
    assert exit_of_usage.value.code == 2


def test_names_and_metadata(tmp_path):
    _, run = import_tensors(tmp_path, official_tensors(CASES[0]))
    reader = CheckpointReader(run)
    config, _, _ = golden_case(CASES[0])
    assert reader.groups() == ["model"]
    assert set(reader.record.tau.values()) == {8.0, 16.0}
    declared = model_parameters(config)
    assert {math.prod(reader.shape("model", name)) for name in reader.names("model")} <= {64, 4096, 16384}
    assert toy.read_all(run)["model"].keys() == declared.keys()
