"""The command inspect-checkpoint, and the format read without us."""

import json
from pathlib import Path

import pytest
import torch

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.commands import inspect_checkpoint
from megatron_tf.config import GrowthStage
from megatron_tf.growth.grow import grow
from tests.support.toy import random_tensors, read_all, same, save, target

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def inspect():
    """The command's main()."""
    return lambda *arguments: inspect_checkpoint.main([str(argument) for argument in arguments])


def test_it_says_what_is_there(tmp_path, inspect, capsys):
    tensors = random_tensors()
    base = CheckpointReader(save(tmp_path / "a", tensors, (2, 1, 1)))
    reshard(
        grow(base, GrowthStage(ffn_tokens=72, init="zero_key")), tmp_path / "b", target(1, 1), check_source=base.verify
    )
    assert inspect(tmp_path / "b", "--verify") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "verified: the checksums of all 4 files match" in lines
    assert any(line.endswith("step 100, samples 6,400, tokens 51,200, adam_steps 100, skipped 0") for line in lines)
    norm = torch.stack([tensors["model"][f"layers.{i}.ffn.key_tokens"] for i in range(3)]).norm()
    assert f"layers.*.ffn.key_tokens 3 72 x 6 float32 1,296 {norm:.5g}" in lines
    assert "6 (the root of 36): 3 modules, such as layers.0.ffn" in lines
    assert "at step 100 (51,200 tokens): ffn 36 -> 72 by zero_key, seed 7" in lines


def test_layers_that_differ_are_shown(tmp_path, inspect, capsys):
    base = CheckpointReader(save(tmp_path / "a", random_tensors()))
    stage = GrowthStage(
        ffn_tokens={"1": 72},
        init="zero_key",
        insert_layers=[3],
        old_tokens_lr_scale=0.5,
        rewarmup_iters=9,
        optimizer={"lr": 1e-3},
    )
    reshard(grow(base, stage), tmp_path / "b", target(1, 1), check_source=base.verify)
    assert inspect(tmp_path / "b") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "layers.*.ffn.key_tokens 4 36..72 x 6 float32 1,080" in out
    assert "ffn 36 -> [36, 72, 36, 36], new layers 3 by zero_key" in out
    assert "the learning-rate schedule counts from step 100 (51,200 tokens)" in out
    warming = "warm-up at 0 of 9 steps"
    assert f"original rows: 100 updates in the first moment, 100 in the second, {warming}" in out
    assert (
        f"original rows: 100 updates in the first moment, 100 in the second, learning rate times 0.5, {warming}" in out
    )
    assert f"rows of growth 1: 0 updates in the first moment, 0 in the second, {warming}" in out


def test_a_checkpoint_never_grown_says_so(tmp_path, inspect, capsys):
    assert inspect(save(tmp_path, random_tensors())) == 0
    assert "never grown" in capsys.readouterr().out


def test_diff_compares_any_layouts_bit_for_bit(tmp_path, inspect, capsys):
    tensors = random_tensors()
    save(tmp_path / "a", tensors, (2, 2, 1))
    save(tmp_path / "b", tensors, (1, 3, 2))
    assert inspect(tmp_path / "a", "--diff", tmp_path / "b") == 0
    assert "all 99 tensors are the same, bit for bit" in capsys.readouterr().out
    tensors["exp_avg"]["layers.2.ffn.key_tokens"][5, 1:3] += 1e-6
    tensors["model"]["final_norm.bias"] = torch.zeros(7)
    del tensors["exp_avg_sq"]["embedding.weight"]
    save(tmp_path / "c", tensors, step=200)
    assert inspect(tmp_path / "a", "--diff", tmp_path / "c") == 1
    assert capsys.readouterr().out.splitlines() == [
        "metadata 'training' differs",
        "model final_norm.bias: [6] torch.float32 against [7] torch.float32",
        "exp_avg layers.2.ffn.key_tokens: 2 of 216 values differ",
        f"exp_avg_sq embedding.weight: only in {tmp_path / 'a' / 'step_00000100'}",
    ]


def test_signed_zeros_differ(tmp_path, inspect):
    for name, zero in (("a", 0.0), ("b", -0.0)):
        tensors = random_tensors()
        tensors["model"]["final_norm.bias"][0] = zero
        save(tmp_path / name, tensors)
    assert inspect(tmp_path / "a", "--diff", tmp_path / "b") == 1


def test_errors_are_one_line(tmp_path, inspect, capsys):
    assert inspect(tmp_path / "nowhere") == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'} does not exist: there is no checkpoint to read\n"
    path = save(tmp_path, random_tensors())
    file = path / "model-pp00-tp00-dp00.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert inspect(path, "--verify") == 1
    assert capsys.readouterr().err == f"error: {file} is damaged: its checksum does not match\n"


def example_in_docs():
    """The Python block of docs/checkpoint_format.md."""
    text = (REPOSITORY / "docs/checkpoint_format.md").read_text()
    return text.split("```python\n")[1].split("```")[0]


def test_the_example_in_the_docs_reads_a_checkpoint(tmp_path):
    tensors = random_tensors()
    save(tmp_path, tensors, (3, 2, 2))
    names = {}
    exec(compile(example_in_docs(), "checkpoint_format.md", "exec"), names)
    for group in tensors:
        assert same({group: names["read_group"](tmp_path, group)}, {group: tensors[group]})


def test_every_file_explains_itself(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    path = save(tmp_path, random_tensors(), (2, 1, 1))
    file = path / "model-pp00-tp01-dp00.safetensors"
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    rows = json.loads(header["__metadata__"]["rows"])
    assert rows["layers.0.ffn.key_tokens"] == [18, 36]
    assert same(
        {"model": {name: read_all(path)["model"][name][start:stop] for name, (start, stop) in rows.items()}},
        {"model": {name: load_file(file)[name] for name in rows}},
    )
