"""Shrink and perturb: which rows of which tensors change, by how much, and that the tool says so."""

import pytest
import torch

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.config import GrowthStage
from megatron_tf.growth.grow import grow
from megatron_tf.growth.utility import Utility
from megatron_tf.layers.pattention import Pattention
from megatron_tf.tokenformer.initial_values import normal_rows
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support.grown import PLAIN, trained_checkpoint
from tests.support.toy import read_all

FACTOR, STD = 0.75, 0.01


def whole(checkpoint, group, name):
    return checkpoint.read_rows(group, name, start=0, stop=checkpoint.shape(group, name)[0])


def is_zero_or_drawn(record, name, rows, keys):
    """Whether each row of a grown tensor is new: neither an old row nor a copy of one."""
    parameter = model_parameters(record.model)[name]
    if parameter.layer is None:
        return torch.zeros(rows, dtype=torch.bool)
    is_new_layer = parameter.layer == 1  # inserted
    if is_new_layer and (keys["layer_init"] == "identity" or parameter.ends_branch):
        return torch.ones(rows, dtype=torch.bool)
    if parameter.kind != "ffn":
        return torch.zeros(rows, dtype=torch.bool)
    return torch.arange(rows) >= (128 if keys.get("init") == "duplicate" else 64)


CASES = {
    "zero keys, identity": ({}, {"layer_init": "identity"}),
    "duplicates, a copied layer": ({}, {"layer_init": "copy_zero", "init": "duplicate"}),
    "untied": ({"untie_embeddings_and_output_weights": True}, {"layer_init": "identity"}),
    "MLP": (PLAIN, {"layer_init": "copy_zero"}),
}


@pytest.mark.parametrize("case", CASES)
def test_old_rows_and_their_copies_are_scaled_and_get_noise(case, tmp_path):
    model, keys = CASES[case]
    source = CheckpointReader(trained_checkpoint(tmp_path / "a", **model))
    if model.get("layer") != "transformer":
        keys = {"init": "zero_key", **keys}
    keys = {"ffn_tokens": 140, "insert_layers": [1], **keys}
    before = grow(source, GrowthStage(**keys))
    after = grow(source, GrowthStage(shrink_factor=FACTOR, perturb_std=STD, **keys))
    drawn = []
    for name, parameter in model_parameters(before.record.model).items():
        old, new = whole(before, "model", name), whole(after, "model", name)
        if parameter.module == "final_norm":
            assert torch.equal(old, new)
            continue
        is_new = is_zero_or_drawn(before.record, name, len(old), keys)
        assert torch.equal(new[is_new], old[is_new]), name
        noise = (new - FACTOR * old)[~is_new]
        if len(noise):
            drawn.append(noise)
            stream = f"growth.0.{name}.perturb"
            seed = before.record.seed
            expected = normal_rows(stream, seed=seed, start=0, stop=len(old), columns=old.shape[1], std=STD)
            torch.testing.assert_close(noise, expected[~is_new], rtol=0, atol=1e-6)
    values = torch.cat([noise.flatten() for noise in drawn])
    assert values.std() == pytest.approx(STD, rel=0.02)
    assert values.mean().abs() < 0.03 * STD
    assert len({tuple(noise[0].tolist()) for noise in drawn}) == len(drawn)  # no two tensors share their noise
    for group in ("exp_avg", "exp_avg_sq"):
        for name in before.names(group):
            assert torch.equal(whole(before, group, name), whole(after, group, name))
    assert before.record == after.record


def test_copies_by_utility_are_old_rows_too(tmp_path):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    utility = Utility({"layers.0.ffn": (2,) * 16 + (1,) * 48}, {"layers.0.ffn": 1.1})
    keys = {"ffn_tokens": {"0": 80}, "init": "duplicate_by_utility", "utility_data": "unused"}
    before = grow(source, GrowthStage(**keys), utility=utility)
    after = grow(source, GrowthStage(shrink_factor=0.5, **keys), utility=utility)
    for name in ("layers.0.ffn.key_tokens", "layers.0.ffn.value_tokens"):
        assert torch.equal(whole(after, "model", name), 0.5 * whole(before, "model", name))


def test_a_wider_model_is_old_throughout(tmp_path):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    before = grow(source, GrowthStage(hidden_multiple=2))
    after = grow(source, GrowthStage(hidden_multiple=2, shrink_factor=0.5))
    for name in before.names("model"):
        factor = 1.0 if name.startswith("final_norm") else 0.5
        assert torch.equal(whole(after, "model", name), factor * whole(before, "model", name))


def test_each_growth_has_its_own_noise(tmp_path):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    once = grow(source, GrowthStage(ffn_tokens=72, perturb_std=STD))
    twice = grow(once, GrowthStage(ffn_tokens=80, perturb_std=STD))
    first = whole(once, "model", "embedding.weight") - whole(source, "model", "embedding.weight")
    second = whole(twice, "model", "embedding.weight") - whole(once, "model", "embedding.weight")
    assert (first - second).std() == pytest.approx(2**0.5 * STD, rel=0.1)


def test_one_and_zero_change_no_bit(tmp_path):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    plain = grow(source, GrowthStage(ffn_tokens=72))
    same = grow(source, GrowthStage(ffn_tokens=72, shrink_factor=1.0, perturb_std=0.0))
    assert list(differences(plain, same)) == []


def test_any_layout_draws_the_same_noise(tmp_path, capsys):
    source = trained_checkpoint(tmp_path / "a")
    written = []
    for layout in ([], ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]):
        target = tmp_path / f"b{len(layout)}"
        options = ["--grow", "ffn=128", "--shrink-factor", str(FACTOR), "--perturb-std", str(STD), "--verify"]
        assert reshard_checkpoint.main(["--load", str(source), "--save", str(target), *options, *layout]) == 0
        written.append(read_all(target))
    assert "does not preserve the model's outputs" in capsys.readouterr().out
    for group, named in written[0].items():
        for name, tensor in named.items():
            assert torch.equal(tensor, written[1][group][name])
    stage = GrowthStage(ffn_tokens=128, shrink_factor=FACTOR, perturb_std=STD)
    expected = grow(CheckpointReader(source), stage)
    assert list(differences(expected, CheckpointReader(tmp_path / "b0"))) == []


@pytest.mark.parametrize(
    ("norm", "is_cancelled"), [("l2_norm_gelu", True), ("gelu_l2_norm", False), ("softmax", False)]
)
def test_what_a_norm_cancels_is_as_documented(norm, is_cancelled):
    """A factor common to all keys of a module, which shrinking is where no row is new."""
    module = Pattention(8, 8, num_tokens=12, norm_activation=norm).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.randn(5, 8, generator=generator, dtype=torch.float64)
        before = module(x)
        module.key_tokens.mul_(0.5)
        moved = (module(x) - before).abs().max()
    assert (moved < 1e-9) == is_cancelled
