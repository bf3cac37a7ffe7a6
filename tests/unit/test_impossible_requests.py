"""Prompts, numbers and options of generation that can't be: one line names them, and nothing is lost."""

import io
import json
import sys

import pytest
import torch

from megatron_tf.generate import main
from megatron_tf.inference.generation import Generation
from megatron_tf.inference.sampling import Sampling, sample_tokens
from tests.support.models import greedy_ids, random_model, write_checkpoint

LOGITS = torch.tensor([[1.0, 3.0, 2.0], [-5e4, 7e4, 7e4 - 1]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint", random_model())


@pytest.fixture
def generate(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("temperature", [1e-40, 1e-45, 5e-324, 1e-25])
def test_a_temperature_near_zero_is_greedy(temperature):
    uniform = torch.tensor([0.0, 0.999], dtype=torch.float64)
    assert sample_tokens(LOGITS, Sampling(temperature), uniform).tolist() == [1, 1]


@pytest.mark.parametrize("top_p", [1e-40, 1e-50, 5e-324])
@pytest.mark.parametrize("drawn", [0.0, 0.999])
def test_a_share_near_zero_keeps_the_likeliest(top_p, drawn):
    uniform = torch.full((2,), drawn, dtype=torch.float64)
    assert sample_tokens(LOGITS, Sampling(1.0, top_p=top_p), uniform).tolist() == [1, 1]


@pytest.mark.parametrize("options", [["--temperature", "1e-40"], ["--top-p", "1e-50"], ["--temperature", "1e300"]])
def test_extreme_numbers_generate(checkpoint, generate, options):
    code, out, _ = generate(checkpoint, "--prompt", "hi", "--max-new-tokens", 3, *options)
    assert code == 0
    assert out.startswith("hi")


def test_a_temperature_near_zero_gives_the_greedy_text():
    model, prompts = random_model(), [[1, 2, 3]]
    generation = Generation(model, prompts, Sampling(1e-40), seed=5)
    assert [generation.step()[0] for _ in range(4)] == greedy_ids(model, prompts, 4)[0]


@pytest.mark.parametrize("line", ['{"prompt": "\\ud83d"}', '{"prompt": "x", "id": "\\udfff"}'])
def test_a_lone_surrogate_is_named_by_its_line(checkpoint, generate, tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    code, out, error = generate(checkpoint, "--prompt-file", tmp_path / "p.jsonl", "--max-new-tokens", 2)
    assert (code, out) == (1, "")
    assert f"error: {tmp_path / 'p.jsonl'}, line 2: character" in error
    assert "which is not text" in error


def test_bytes_that_are_not_utf8_are_named_wherever_they_come_from(checkpoint, generate, tmp_path, monkeypatch):
    code, _, error = generate(checkpoint, "--prompt", "fine", "--prompt", b"caf\xe9".decode(errors="surrogateescape"))
    assert code == 1
    assert error.startswith("error: --prompt, number 2: character 4 is '\\udce9', which is not text")
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    code, _, error = generate(checkpoint, "--prompt-file", tmp_path / "p.txt")
    assert code == 1
    assert f"{tmp_path / 'p.txt'} is not UTF-8 at byte 3" in error
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    code, _, error = generate(checkpoint)
    assert code == 1
    assert "the standard input is not UTF-8 at byte 3" in error


def test_a_closed_standard_input_holds_no_prompt(checkpoint, generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, _, error = generate(checkpoint)
    assert code == 1
    assert error.startswith("error: the standard input holds no prompt")


@pytest.mark.parametrize("seed", [10**30, 2**63, -(2**63) - 1])
def test_a_seed_of_too_many_bits_is_refused(checkpoint, generate, seed):
    code, _, error = generate(checkpoint, "--prompt", "x", f"--seed={seed}")
    assert code == 1
    assert error == f"error: --seed ({seed}) must be within 64 bits\n"


def test_the_output_never_replaces_the_prompts(checkpoint, generate, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}))
    code, _, error = generate(checkpoint, "--prompt-file", path, "--output", path)
    assert code == 1
    assert "would replace --prompt-file" in error
    assert path.read_text() == json.dumps({"prompt": "fine"})


def test_the_output_is_not_written_into_the_checkpoint(checkpoint, generate):
    code, _, error = generate(checkpoint, "--prompt", "x", "--output", checkpoint / "step_00000000" / "out.jsonl")
    assert code == 1
    assert "is inside the checkpoint" in error
    assert generate(checkpoint, "--prompt", "x", "--max-new-tokens", 1)[0] == 0
