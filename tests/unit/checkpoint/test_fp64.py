"""Checkpoints of fp64 runs: which types are complete, and that every transformation computes in float64."""

from dataclasses import replace

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.checkpoint.vocabulary import pad_vocabulary
from megatron_tf.commands import inspect_checkpoint
from megatron_tf.config import GrowthStage
from megatron_tf.growth.grow import grow
from megatron_tf.growth.shrink import shrink
from megatron_tf.tokenformer.initial_values import normal_rows
from tests.support.toy import GROUPS, HIDDEN, LAYERS, TOKENS, random_tensors, read_all, record, same, save, target

STD = 2 / (LAYERS * HIDDEN**0.5)
SEED = 7
KEYS, VALUES = "layers.1.ffn.key_tokens", "layers.1.ffn.value_tokens"


def fp64_record(precision="fp64"):
    facts = record()
    training = {**facts.config["training"], "precision": precision}
    return replace(facts, config={**facts.config, "training": training})


def fp64_tensors():
    """Random numbers, with digits that fp32 does not have."""
    generator = torch.Generator().manual_seed(1)
    return {
        group: {
            name: torch.randn(tensor.shape, dtype=torch.float64, generator=generator) for name, tensor in named.items()
        }
        for group, named in random_tensors().items()
    }


@pytest.fixture
def tensors():
    return fp64_tensors()


@pytest.fixture
def checkpoint(tmp_path, tensors):
    return CheckpointReader(save(tmp_path / "a", tensors, (2, 2, 1), facts=fp64_record())).complete()


def test_it_comes_back_bit_for_bit_on_any_layout(checkpoint, tensors, tmp_path):
    assert same(read_all(checkpoint.directory), tensors)
    wide = reshard(checkpoint, tmp_path / "b", target(3, 2), check_source=checkpoint.verify)
    back = reshard(CheckpointReader(wide), tmp_path / "c", target(1, 1))
    assert same(read_all(back), tensors)
    assert CheckpointReader(back).complete().record == fp64_record()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("precision", "stored", "wanted"),
    [("fp64", "float32", "float64"), ("fp32", "float64", "float32"), ("bf16", "float64", "float32")],
)
def test_a_tensor_of_another_type_than_the_run_says_is_refused(tmp_path, group, precision, stored, wanted):
    tensors = random_tensors() if wanted == "float32" else fp64_tensors()
    tensors[group][KEYS] = tensors[group][KEYS].to(getattr(torch, stored))
    path = save(tmp_path / "a", tensors, facts=fp64_record(precision))
    with pytest.raises(CheckpointError, match=rf"{group} {KEYS} is .* torch.{stored}, expected .* torch.{wanted}"):
        CheckpointReader(path).complete()


def grown(checkpoint, root, **keys):
    return read_all(reshard(grow(checkpoint, GrowthStage(**keys)), root, target(1, 1)))


def test_copies_are_scaled_in_float64_and_noise_is_added_exactly(checkpoint, tensors, tmp_path):
    after = grown(checkpoint, tmp_path / "b", ffn_tokens=3 * 36, init="duplicate", noise=0.5)
    scales = {("model", VALUES): 1 / 3, ("exp_avg", KEYS): 1 / 3, ("exp_avg_sq", KEYS): 3**-2}
    for group in GROUPS:
        for name in (KEYS, VALUES):
            old, found = tensors[group][name], after[group][name]
            assert found.dtype == torch.float64
            for number, copy in enumerate(found.unflatten(0, (3, -1))):
                expected = old * scales.get((group, name), 1.0)
                if (group, name) == ("model", VALUES):
                    expected = expected + noise(VALUES, number) - noise(VALUES, (number + 1) % 3)
                assert torch.equal(copy, expected), (group, name, number)
    total = after["model"][VALUES].unflatten(0, (3, -1)).sum(0)
    assert (total - tensors["model"][VALUES]).abs().max() < 1e-15


def noise(name, number):
    stream = f"growth.0.{name}.copy{number}"
    return normal_rows(stream, seed=SEED, start=0, stop=36, columns=HIDDEN, std=0.5 * STD).double()


def test_new_rows_are_the_fp32_draws(checkpoint, tensors, tmp_path):
    after = grown(checkpoint, tmp_path / "b", ffn_tokens=40, insert_layers=[0])
    assert {tensor.dtype for named in after.values() for tensor in named.values()} == {torch.float64}
    old, new = tensors["model"][VALUES], after["model"]["layers.2.ffn.value_tokens"]
    drawn = normal_rows("layers.2.ffn.value_tokens", seed=SEED, start=36, stop=40, columns=HIDDEN, std=3 / 4 * STD)
    assert torch.equal(new, torch.cat((old, drawn.double())))
    keys = normal_rows("growth.0.layers.0.ffn.key_tokens", seed=SEED, start=0, stop=40, columns=HIDDEN, std=0.02)
    assert torch.equal(after["model"]["layers.0.ffn.key_tokens"], keys.double())
    padded = read_all(reshard(pad_vocabulary(checkpoint, 32), tmp_path / "c", target(1, 1)))["model"]
    drawn = normal_rows("embedding.weight", seed=SEED, start=24, stop=32, columns=HIDDEN, std=0.02)
    assert torch.equal(padded["embedding.weight"][24:], drawn.double())


def test_grow_then_shrink_is_the_identity(checkpoint, tensors, tmp_path):
    larger = CheckpointReader(reshard(grow(checkpoint, GrowthStage(ffn_tokens=72)), tmp_path / "b", target(1, 1)))
    kept = {f"layers.{layer}.ffn": range(TOKENS["ffn"]) for layer in range(LAYERS)}
    assert same(read_all(reshard(shrink(larger, kept), tmp_path / "c", target(2, 1))), tensors)


def test_inspection_shows_the_type(checkpoint, capsys):
    assert inspect_checkpoint.main([str(checkpoint.directory), "--verify"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  layers.*.ffn")]
    assert len(lines) == 6
    assert all("float64" in line for line in lines)
