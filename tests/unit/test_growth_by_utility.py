"""Duplication by utility: which tokens get copies, and their values, moments, generations and temperatures."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generation
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.config import GrowthStage
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.growth.grow import grow
from megatron_tf.growth.utility import Utility, choose_copies, measure_utility
from megatron_tf.inference.model import load_model
from megatron_tf.model.from_checkpoint import read_transformer
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support.data import write_data_set
from tests.support.grown import trained_checkpoint, write_text
from tests.support.models import SEQ_LENGTH

NORMS = ["l2_norm_gelu", "gelu_l2_norm", "softmax"]


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


def stage_of(text, **keys):
    return GrowthStage(init="duplicate_by_utility", utility_data=str(text), **keys)


def tool(source, root, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(root), *map(str, options)])


@pytest.mark.parametrize(
    ("contributions", "num_tokens", "copies"),
    [
        ([5.0, 3.0, 1.0], 3, (1, 1, 1)),
        ([5.0, 3.0, 1.0], 5, (2, 2, 1)),  # 5, then 3 (5/2 is less)
        ([5.0, 3.0, 1.0], 6, (3, 2, 1)),
        ([1.0, 9.0], 6, (1, 5)),
        ([2.0, 2.0, 2.0], 5, (2, 2, 1)),
        ([2.0, 2.0, 2.0], 9, (3, 3, 3)),
        ([2.0, 1.0], 4, (3, 1)),  # 2/2 = 1/1: the first
        ([0.0, 4.0, 0.0], 5, (1, 3, 1)),
        ([0.0, 0.0, 0.0], 5, (2, 2, 1)),  # nothing contributes: all count the same
    ],
)
def test_the_next_copy_is_of_the_token_with_the_largest_contribution_per_copy(contributions, num_tokens, copies):
    assert choose_copies(torch.tensor(contributions, dtype=torch.float64), num_tokens) == copies


def test_equal_copies_are_duplication_bit_for_bit(tmp_path):
    """With three copies of every token, values with noise, moments and generations are those of `duplicate`."""
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    keys = {"ffn_tokens": 192, "num_layers": 4, "layer_init": "copy", "rewarmup_iters": 2}
    expected = grow(source, GrowthStage(init="duplicate", **keys))
    paths = [f"layers.{i}.ffn" for i in range(4)]
    utility = Utility(dict.fromkeys(paths, (3,) * 64), dict.fromkeys(paths, 3**0.5))
    found = grow(source, stage_of("unused", **keys), utility=utility)
    assert list(differences(expected, found)) == []
    assert found.record.tau == expected.record.tau
    assert found.record.generations == expected.record.generations


COPIES = (1, 3, 2, 1, 2, 1, 1, 1) * 8
ORDER = [*range(64), *(j for j in range(64) if COPIES[j] == 2), *[j for j in range(64) if COPIES[j] == 3] * 2]
"""The old token of each row: the old ones, the second copies of two, the second and the third copies of three."""


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("step_scale", ["preserve", "none"])
def test_each_token_shares_its_value_and_moments_among_its_own_copies(tmp_path, noise, step_scale):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    stage = stage_of("unused", ffn_tokens={"1": 96}, noise=noise, step_scale=step_scale)
    grown = grow(source, stage, utility=Utility({"layers.1.ffn": COPIES}, {"layers.1.ffn": 1.25}))
    share = torch.tensor([1 / COPIES[j] for j in ORDER])[:, None]
    for side, factors in (("key", (1, share, share * share)), ("value", (share, 1, 1))):
        name = f"layers.1.ffn.{side}_tokens"
        for group, factor in zip(("model", "exp_avg", "exp_avg_sq"), factors, strict=True):
            old = source.read_rows(group, name, start=0, stop=64)
            new = grown.read_rows(group, name, start=0, stop=96)
            if (side, group) == ("value", "model") and noise:
                sums = torch.zeros_like(old).index_add_(0, torch.tensor(ORDER), new)
                torch.testing.assert_close(sums, old, rtol=1e-5, atol=1e-5)
                difference = new - share * old[ORDER]
                of_single = [row for row, j in enumerate(ORDER) if COPIES[j] == 1]
                assert not difference[of_single].any()
                others = [row for row in range(96) if row not in of_single]
                std = noise * model_parameters(grown.record.model)[name].initial.std
                assert difference[others].std() == pytest.approx(std * 2**0.5, rel=0.1)
                assert (difference[others].abs().sum(1) > 0).all()
            else:
                torch.testing.assert_close(new, factor * old[ORDER], rtol=2e-7, atol=0)
        runs = grown.record.all_generations.runs(name, 96)
        of_row = [run.generation for run in runs for _ in range(run.count)]
        for row, generation in enumerate(of_row):
            scale = 1 / COPIES[ORDER[row]] if (side, step_scale) == ("value", "preserve") else 1.0
            assert generation == Generation(
                growth=int(row >= 64), exp_avg_steps=5, exp_avg_sq_steps=5, step_scale=scale
            ), (name, row)
    tau = source.record.tau
    assert grown.record.tau == {**tau, "layers.1.ffn": 1.25 * tau["layers.1.ffn"]}


def test_a_checkpoint_of_an_fp64_run_keeps_its_digits(tmp_path, text):
    """Values, noise and old weights that are shrunk: old rows and their copies add up in fp64."""
    source = CheckpointReader(trained_checkpoint(tmp_path / "a", precision="fp64"))
    stage = stage_of(text, ffn_tokens=96, noise=0.1, shrink_factor=0.3)
    utility = measure_utility(source, stage)
    grown = grow(source, stage, utility=utility)
    name = "layers.1.ffn.value_tokens"
    new = grown.read_rows("model", name, start=0, stop=96)
    assert new.dtype == torch.float64
    copies = utility.copies["layers.1.ffn"]
    order = list(range(64))
    for count in sorted(set(copies) - {1}):
        order += [token for token in range(64) if copies[token] == count] * (count - 1)
    sums = torch.zeros(64, 32, dtype=torch.float64).index_add_(0, torch.tensor(order), new)
    torch.testing.assert_close(sums, 0.3 * source.read_rows("model", name, start=0, stop=64), rtol=0, atol=1e-14)


def test_any_rows_are_the_same_as_in_the_whole(tmp_path, monkeypatch):
    """Also where rows that are far apart are read in several blocks."""
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    utility = Utility({"layers.1.ffn": COPIES}, {"layers.1.ffn": 1.0})
    grown = grow(source, stage_of("unused", ffn_tokens={"1": 96}), utility=utility)
    name = "layers.1.ffn.value_tokens"
    whole = grown.read_rows("model", name, start=0, stop=96)
    monkeypatch.setattr("megatron_tf.checkpoint.interface.BLOCK_BYTES", 5 * 32 * 4)  # five rows
    for start, stop in [(0, 96), (0, 1), (63, 66), (70, 93), (95, 96)]:
        assert torch.equal(grown.read_rows("model", name, start=start, stop=stop), whole[start:stop])


def mean_norm(norm, scores):
    """The mean over rows of what the normalization divides by, in numpy and float64."""
    if norm == "softmax":
        return np.exp(scores).sum(1).mean()
    if norm == "gelu_l2_norm":
        scores = scores * 0.5 * (1 + np.vectorize(math.erf)(scores / math.sqrt(2)))
    return np.sqrt((scores**2).sum(1)).mean()


def scores_of(path, module, text):
    """The scores of a module of the checkpoint at `path` over the text, float64 [T, N]."""
    model = load_model(path, dtype=torch.float64)
    dataset = IndexedDataset(text)
    ids = np.concatenate([dataset.document(i) for i in range(len(dataset))]).astype(np.int64)
    found = []
    layer = model.transformer.get_submodule(module)
    with torch.no_grad(), layer.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0])):
        for sample in ids.reshape(-1, SEQ_LENGTH + 1):
            model(torch.from_numpy(sample)[None])
    x = torch.cat([each.flatten(0, -2) for each in found])
    return (x @ layer.key_tokens.detach().T).numpy()


@pytest.mark.parametrize("norm", NORMS)
def test_tau_keeps_the_mean_norm_of_the_rows(tmp_path, norm, text):
    keys = {"norm_activation": norm, "init_method_std": 0.02}
    source = CheckpointReader(trained_checkpoint(tmp_path / "a", **keys))
    stage = stage_of(text, ffn_tokens=100, qkv_tokens=40)
    utility = measure_utility(source, stage)
    assert list(utility.copies) == list(utility.norm_factors)
    assert len(utility.copies) == 12  # all but proj
    for path, copies in utility.copies.items():
        assert (len(copies), sum(copies)) == ((64, 100) if path.endswith("ffn") else (32, 40))
    for path in ("layers.0.attention.query", "layers.2.ffn"):
        scores = scores_of(tmp_path / "a", path, text)
        copied = np.repeat(scores, utility.copies[path], axis=1)
        factor = mean_norm(norm, copied) / mean_norm(norm, scores)
        assert utility.norm_factors[path] == pytest.approx(factor, rel=1e-4)
        assert utility.norm_factors[path] > 1
        tau = grow(source, stage, utility=utility).record.tau
        assert tau[path] == pytest.approx(source.record.tau[path] * factor, rel=1e-4)


def test_the_tokens_that_contribute_most_on_the_text_are_copied(tmp_path, text):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    copies = measure_utility(source, stage_of(text, ffn_tokens=80)).copies["layers.1.ffn"]
    scores = torch.from_numpy(scores_of(tmp_path / "a", "layers.1.ffn", text))
    weights = F.gelu(source.record.tau["layers.1.ffn"] * scores / scores.norm(dim=1, keepdim=True))
    values = source.read_rows("model", "layers.1.ffn.value_tokens", start=0, stop=64).double()
    contributions = (weights[:, :, None] * values).flatten(0, 0).square().sum((0, 2)).sqrt().tolist()
    expected = [1] * 64
    for _ in range(16):
        best = max(range(64), key=lambda j: contributions[j] / expected[j])
        expected[best] += 1
    assert list(copies) == expected


def test_each_layer_that_copies_an_old_one_has_its_own_copies(tmp_path, text):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    keys = {"num_layers": 5, "layer_order": "stacked", "ffn_tokens": {"0": 70, "3": 80, "4": 64}}
    for layer_init, modules in (("copy", ["layers.0.ffn", "layers.3.ffn"]), ("identity", ["layers.0.ffn"])):
        stage = stage_of(text, layer_init=layer_init, **keys)
        utility = measure_utility(source, stage)
        assert list(utility.copies) == modules
        grown = grow(source, stage, utility=utility)
        assert grown.shape("model", "layers.3.ffn.key_tokens") == (80, 32)


@pytest.mark.parametrize("norm", NORMS)
def test_tokens_that_are_copied_equally_often_keep_the_outputs(tmp_path, norm, text, monkeypatch):
    """If all contribute the same, it is an exact duplication, the measured tau included."""
    source = CheckpointReader(trained_checkpoint(tmp_path / "a", norm_activation=norm))
    monkeypatch.setattr(
        "megatron_tf.growth.utility.unit_contributions",
        lambda transformer, samples: dict.fromkeys(transformer.pattentions(), torch.ones(64)),
    )
    stage = stage_of(text, ffn_tokens=128, noise=0.0)
    utility = measure_utility(source, stage)
    assert set(utility.copies.values()) == {(2,) * 64}
    ids = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    old, new = (
        read_transformer(checkpoint, dtype=torch.float64)(ids)
        for checkpoint in (source, grow(source, stage, utility=utility))
    )
    assert (old - new).abs().max() < 1e-12 * old.abs().max()


def test_the_tool_measures_and_says_that_the_outputs_change(tmp_path, text, capsys):
    source = trained_checkpoint(tmp_path / "a")
    options = ["--grow", "ffn=100", "--growth-init", "duplicate_by_utility", "--growth-data", text]
    assert tool(source, tmp_path / "b", *options, "--verify", "--target-tensor-parallel-size", 2) == 0
    assert "does not preserve the model's outputs" in capsys.readouterr().out
    reader = CheckpointReader(source)
    stage = stage_of(text, ffn_tokens=100)
    expected, found = grow(reader, stage, utility=measure_utility(reader, stage)), CheckpointReader(tmp_path / "b")
    assert list(differences(expected, found)) == []
    assert found.record == expected.record
    assert found.record.lineage[0].init == "duplicate_by_utility"


def test_growth_without_what_was_measured_is_refused(tmp_path):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    with pytest.raises(CheckpointError, match=r"init=duplicate_by_utility: pass utility=measure_utility"):
        grow(source, stage_of("unused", ffn_tokens=100))


def test_data_that_is_missing_too_short_or_of_other_ids_is_named(tmp_path):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    with pytest.raises((DataError, OSError), match="none"):
        measure_utility(source, stage_of(tmp_path / "none", ffn_tokens=100))
    short = write_data_set(tmp_path / "short", [[1, 2, 3]])
    with pytest.raises(DataError, match="holds 3 tokens, a sample takes 17"):
        measure_utility(source, stage_of(short, ffn_tokens=100))
    wrong = write_data_set(tmp_path / "wrong", [[300] * 40])
    with pytest.raises(DataError, match="has id 300"):
        measure_utility(source, stage_of(wrong, ffn_tokens=100))


def test_a_model_with_nan_is_refused(tmp_path, text):
    source = CheckpointReader(trained_checkpoint(tmp_path / "a"))
    source.record = replace(source.record, tau={**source.record.tau, "layers.1.ffn": math.nan})
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn has infinite or NaN contributions"):
        measure_utility(source, stage_of(text, ffn_tokens=100))


def test_the_command_line_says_what_belongs_together(tmp_path, capsys):
    source = trained_checkpoint(tmp_path / "a")
    assert tool(source, tmp_path / "b", "--grow", "ffn=100", "--growth-init", "duplicate_by_utility") == 1
    assert "init: duplicate_by_utility and utility_data belong together" in capsys.readouterr().err
    assert tool(source, tmp_path / "b", "--grow", "ffn=100", "--growth-data", "x") == 1
    assert "init: duplicate_by_utility and utility_data belong together" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
