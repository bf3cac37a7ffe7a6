"""Official files of 16 bits: read exactly, each tensor in its own type, and written in a type that is chosen."""

import numpy as np
import pytest
import torch

from tests.support import toy
from tests.support.conversion import convert
from tests.support.data import write_tokenizer
from tests.support.golden import CASES, golden_case

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PATTERNS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
"""Every number of 16 bits."""
FFN = [f"sequential.{layer}.mlp.{kind}_param_tokens" for layer in (2, 3) for kind in ("key", "value")]
"""Four tensors of 256 x 64, which hold all of PATTERNS."""


def official_tensors():
    """A small official model in fp32."""
    _, tensors, _ = golden_case(CASES[0])
    return {name.removeprefix("param/"): value for name, value in tensors.items() if name.startswith("param/")}


def with_every_pattern(dtype):
    tensors = {name: value.to(dtype) for name, value in official_tensors().items()}
    for name, numbers in zip(FFN, PATTERNS.view(dtype).split(256 * 64), strict=True):
        tensors[name] = numbers.view(256, 64).clone()
    return tensors


def import_tensors(folder, tensors):
    """The imported checkpoint's directory."""
    torch.save(tensors, folder / "pytorch_model.bin")
    tokenizer = write_tokenizer(folder / "tokenizer.json", 250)
    known = ["--num-attention-heads", 4, "--norm-activation", "l2_norm_gelu"]
    known += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", tokenizer]
    assert convert("official", "megatron_tf", folder / "pytorch_model.bin", folder / "run", *known) == 0
    return folder / "run"


def export(run, folder, *options):
    """The exported tensors."""
    assert convert("megatron_tf", "official", run, folder, *options) == 0
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def in_fp32(numbers):
    """What 16 bits mean, by other code than torch's."""
    if numbers.dtype == torch.bfloat16:
        bits = numbers.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << 16
        return torch.from_numpy(bits.view(np.float32))
    return torch.from_numpy(numbers.view(torch.int16).numpy().view(np.float16).astype(np.float32))


def is_same(found, expected):
    """Bit for bit; NaN may be any NaN."""
    assert found.dtype == expected.dtype
    width = {2: torch.int16, 4: torch.int32}[found.itemsize]
    is_equal = found.view(width) == expected.view(width)
    return bool((is_equal | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("name", TYPES)
def test_every_number_of_16_bits_is_imported_exactly_and_comes_back(name, tmp_path):
    tensors = with_every_pattern(TYPES[name])
    run = import_tensors(tmp_path, tensors)
    ours = toy.read_all(run)["model"]
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    for name_there in FFN:
        _, layer, _, kind = name_there.removesuffix("_param_tokens").split(".")
        assert is_same(ours[f"layers.{int(layer) - 2}.ffn.{kind}_tokens"], in_fp32(tensors[name_there]))
    back = export(run, tmp_path / "back", "--dtype", name)
    assert back.keys() == tensors.keys()
    assert all(is_same(back[key], tensors[key]) for key in tensors)


def test_each_tensor_of_a_file_may_have_its_own_type(tmp_path):
    mixed = {
        name: value.to([torch.float32, torch.bfloat16, torch.float16][i % 3])
        for i, (name, value) in enumerate(official_tensors().items())
    }
    back = export(import_tensors(tmp_path, mixed), tmp_path / "back")
    for name, value in mixed.items():
        assert is_same(back[name], value if value.dtype == torch.float32 else in_fp32(value))


@pytest.mark.parametrize("name", TYPES)
def test_an_export_rounds_to_the_nearest_number_ties_to_even(name, tmp_path):
    tensors = official_tensors()
    exponents = torch.tensor([0, 0, 0, 0, -5, 3]).float()
    step = {"bf16": 2.0**-7, "fp16": 2.0**-10}[name]  # between numbers from 1 to 2
    steps = torch.tensor([0.49, 0.5, 1.5, 2.51, 4.5, 6.75])
    rounded = torch.tensor([0.0, 0.0, 2.0, 3.0, 4.0, 7.0])
    tensors[FFN[0]][0, :6] = 2.0**exponents * (1 + steps * step)
    back = export(import_tensors(tmp_path, tensors), tmp_path / "back", "--dtype", name)
    assert {tensor.dtype for tensor in back.values()} == {TYPES[name]}
    assert torch.equal(back[FFN[0]][0, :6].float(), 2.0**exponents * (1 + rounded * step))


def test_a_file_of_16_bits_takes_half_the_bytes(tmp_path):
    run = import_tensors(tmp_path, official_tensors())
    export(run, tmp_path / "whole")
    export(run, tmp_path / "half", "--dtype", "bf16")
    whole, half = ((tmp_path / name / "pytorch_model.bin").stat().st_size for name in ("whole", "half"))
    data = sum(tensor.nbytes for tensor in official_tensors().values())
    assert whole - half == pytest.approx(data / 2, rel=0.01)


@pytest.mark.parametrize("number", [65520.0, -1e30])
def test_a_number_too_large_for_fp16_is_named_and_nothing_is_written(number, tmp_path, capsys):
    tensors = official_tensors()
    tensors["sequential.5.norm.bias"][7] = number
    run = import_tensors(tmp_path, tensors)
    assert convert("megatron_tf", "official", run, tmp_path / "back", "--dtype", "fp16") == 1
    error = capsys.readouterr().err
    assert f"final_norm.bias holds {number:g}, which is too large for float16: export with --dtype bf16" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*back*"))
    assert export(run, tmp_path / "back", "--dtype", "bf16")["sequential.5.norm.bias"][7].isfinite()


def test_an_infinite_number_of_the_model_stays_one(tmp_path):
    tensors = official_tensors()
    tensors["sequential.5.norm.bias"][7] = -torch.inf
    back = export(import_tensors(tmp_path, tensors), tmp_path / "back", "--dtype", "fp16")
    assert back["sequential.5.norm.bias"][7] == -torch.inf


@pytest.mark.parametrize("target", [("megatron_tf", "hf"), ("official", "megatron_tf")])
def test_a_type_is_chosen_for_official_files_alone(target, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_of_usage:
        convert(*target, tmp_path, tmp_path / "out", "--dtype", "bf16")
    assert exit_of_usage.value.code == 2
    assert "--dtype is for --to official" in capsys.readouterr().err


def test_files_of_16_bits_of_the_old_kind_are_read(tmp_path):
    tensors = with_every_pattern(torch.float16)
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    known = ["--num-attention-heads", 4, "--norm-activation", "l2_norm_gelu", "--vocab-size", 250]
    assert convert("official", "megatron_tf", tmp_path / "old.bin", tmp_path / "run", *known) == 0
    assert is_same(toy.read_all(tmp_path / "run")["model"]["layers.1.ffn.value_tokens"], in_fp32(tensors[FFN[3]]))
