"""Growth and shrinking of the official fixtures by the tool: the logits stay, or it says that they do not."""

import re

import numpy as np
import pytest
import torch

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.checkpoint.summary import differences
from megatron_tf.commands import reshard_checkpoint, resharding
from megatron_tf.config import to_dict
from megatron_tf.inference.comparison import mean_token_loss
from megatron_tf.inference.importance import token_importance
from megatron_tf.inference.model import load_model
from megatron_tf.model.parallelize import parameter_shards
from megatron_tf.model.samples import read_samples
from megatron_tf.parallel.mesh import Mesh
from tests.support.data import write_data_set
from tests.support.golden import golden_model
from tests.support.records import make_record
from tests.support.training import small_run

L2_CASES = ["A_l2_norm_gelu", "B_gelu_l2_norm"]
SEQ_LENGTH = 16


def golden_checkpoint(case, root):
    model, tensors, _ = golden_model(case)
    record = make_record(model.config, config=to_dict(small_run(training={"seq_length": SEQ_LENGTH})))
    save_checkpoint(
        root,
        0,
        tensors={"model": parameter_shards(model, mesh=Mesh(torch.device("cpu")))},
        record=record,
        writer_label="one",
    )
    return tensors


def tool(source, target, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(target), *map(str, options)])


def grow(source, target, request, *options):
    return tool(source, target, "--grow", request, "--verify", *options)


def in_float64(model):
    model.transformer.to(torch.float64).dtype = torch.float64
    return model


def logits_moved(before, after, ids):
    """Largest difference in fp32, and in float64."""
    old, new = load_model(before), load_model(after)
    with torch.no_grad():
        single = (old(ids) - new(ids)).abs().max()
        return single, (in_float64(old)(ids) - in_float64(new)(ids)).abs().max()


@pytest.fixture
def text(tmp_path):
    """A data set of the fixtures' ids."""
    ids = np.random.default_rng(0).integers(0, 256, 40 * (SEQ_LENGTH + 1)).astype(np.uint16)
    write_data_set(tmp_path / "text", [ids[:300], ids[300:]])
    return tmp_path / "text"


@pytest.mark.parametrize("case", L2_CASES)
@pytest.mark.parametrize("request_", ["qkv=96,proj=70", "ffn=300", "ffn=512", "qkv=128,proj=128,ffn=1024"])
@pytest.mark.parametrize("init", ["zero_key", "auto"])
def test_logits_stay(case, request_, init, tmp_path):
    """With zero keys 0 on an Intel CPU; sums in an order that depends on the number of tokens gave 3.3e-6."""
    ids = golden_checkpoint(case, tmp_path / "a")["input_ids"]
    assert grow(tmp_path / "a", tmp_path / "b", request_, "--growth-init", init) == 0
    single, double = logits_moved(tmp_path / "a", tmp_path / "b", ids)
    assert single <= (1e-6 if init == "zero_key" else 1e-5)
    assert double <= (1e-13 if init == "zero_key" else 1e-7)  # rotated keys are stored in fp32


@pytest.mark.parametrize("case", L2_CASES)
def test_logits_stay_within_rounding_from_any_size(case, tmp_path):
    tensors = golden_checkpoint(case, tmp_path / "a")
    assert grow(tmp_path / "a", tmp_path / "b", "qkv=97,ffn=301") == 0
    assert grow(tmp_path / "b", tmp_path / "c", "proj=70,qkv=130,ffn=512") == 0
    before, after = load_model(tmp_path / "a"), load_model(tmp_path / "c")
    with torch.no_grad():
        ids = tensors["input_ids"]
        logits = before(ids)
        assert (logits - after(ids)).abs().max() <= 1e-6
        assert (in_float64(before)(ids) - in_float64(after)(ids)).abs().max() < 1e-13
        for module in after.transformer.pattentions().values():
            module.tau *= 1.01  # the test must see a temperature that is not kept
        assert (before(ids) - after(ids)).abs().max() > 1e-2
    assert [event.kinds for event in after.record.lineage] == [
        {"qkv": [64, 97], "ffn": [256, 301]},
        {"qkv": [97, 130], "proj": [64, 70], "ffn": [301, 512]},
    ]


@pytest.mark.parametrize(
    ("case", "request_"),
    [
        ("A_l2_norm_gelu", "qkv=128,proj=150,ffn=768"),
        ("B_gelu_l2_norm", "qkv=150,proj=128,ffn=800"),
        ("C_softmax", "qkv=128,proj=192,ffn=512"),
    ],
)
@pytest.mark.parametrize("noise", [0, 0.3])
def test_duplicates_keep_the_logits(case, request_, noise, tmp_path):
    ids = golden_checkpoint(case, tmp_path / "a")["input_ids"]
    options = ["--growth-init", "duplicate", "--growth-noise", noise]
    assert grow(tmp_path / "a", tmp_path / "b", request_, *options) == 0
    single, double = logits_moved(tmp_path / "a", tmp_path / "b", ids)
    assert single < 2e-5
    assert double < 1e-6  # values are stored in fp32, where V/3 and the noise are rounded
    if noise == 0 and case == "A_l2_norm_gelu":
        module = load_model(tmp_path / "b").transformer.pattentions()["layers.0.attention.query"]
        module.tau *= 1.01
        assert module.tau == pytest.approx(128**0.5 * 1.01)


def test_rotated_keys_keep_the_logits(tmp_path):
    ids = golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")["input_ids"]
    assert grow(tmp_path / "a", tmp_path / "b", "qkv=128,proj=150,ffn=768", "--growth-init", "rotated_key") == 0
    single, double = logits_moved(tmp_path / "a", tmp_path / "b", ids)
    assert single < 2e-5
    assert double < 1e-6  # rotated keys are stored in fp32
    assert load_model(tmp_path / "b").record.lineage[0].init == "rotated_key"


@pytest.mark.parametrize("case", [*L2_CASES, "C_softmax"])
def test_duplicates_share_out_the_gradient_as_their_moments_do(case, tmp_path):
    """Keys get 1/m of it, values all of it: what growth does to Adam's moments."""
    ids = golden_checkpoint(case, tmp_path / "a")["input_ids"]
    assert grow(tmp_path / "a", tmp_path / "b", "ffn=768", "--growth-init", "duplicate", "--growth-noise", 0) == 0
    gradients = []
    for path in ("a", "b"):
        model = in_float64(load_model(tmp_path / path)).train()
        model(ids).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.transformer.named_parameters()})
    old, new = gradients
    for side, scale in (("key", 1 / 3), ("value", 1)):
        name = f"layers.0.ffn.{side}_tokens"
        for copy in new[name].unflatten(0, (3, -1)):
            torch.testing.assert_close(copy, scale * old[name], rtol=1e-5, atol=1e-7 * float(old[name].abs().max()))


def key_gradients(path, ids):
    """Gradients of the ffn keys of the first layer, [copies, N, D]."""
    model = load_model(path).train()
    model(ids).square().mean().backward()
    keys = model.transformer.get_parameter("layers.0.ffn.key_tokens")
    return keys.grad.unflatten(0, (2, -1))


def test_noise_lets_copies_part(tmp_path):
    ids = golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")["input_ids"]
    for noise in (0, 0.1):
        options = ["--growth-init", "duplicate", "--growth-noise", noise]
        assert grow(tmp_path / "a", tmp_path / f"b{noise}", "ffn=512", *options) == 0
    same, parted = (key_gradients(tmp_path / f"b{noise}", ids) for noise in (0, 0.1))
    assert torch.allclose(same[0], same[1], rtol=1e-4, atol=1e-9)
    assert (parted[0] - parted[1]).norm() > 0.01 * parted[0].norm()


@pytest.mark.parametrize("case", [*L2_CASES, "C_softmax"])
def test_new_layers_are_the_identity(case, tmp_path):
    ids = golden_checkpoint(case, tmp_path / "a")["input_ids"]
    assert tool(tmp_path / "a", tmp_path / "b", "--insert-layers", "0,1,1,2", "--verify") == 0
    single, double = logits_moved(tmp_path / "a", tmp_path / "b", ids)
    assert single == 0
    assert double == 0
    model = load_model(tmp_path / "b").train()
    model(ids).square().mean().backward()
    for layer in (0, 2, 3, 5):
        for module in ("attention.proj", "ffn"):
            assert model.transformer.get_parameter(f"layers.{layer}.{module}.value_tokens").grad.abs().max() > 0


def test_random_growth_is_said_to_move_the_logits(tmp_path, text, capsys):
    golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")
    assert grow(tmp_path / "a", tmp_path / "b", "ffn=512", "--growth-init", "random", "--data", text) == 0
    out = capsys.readouterr().out
    assert "does not preserve the model's outputs" in out
    moved = float(re.search(r"max \|delta logit\| before and after: (\S+)", out)[1])
    assert moved > 0.1
    losses = re.search(r"loss on .*: (\S+) before, (\S+) after", out)
    samples = read_samples(text, vocab_size=256, seq_length=SEQ_LENGTH, num_tokens=16384)
    for path, loss in zip("ab", losses.groups(), strict=True):
        assert float(loss) == pytest.approx(mean_token_loss(load_model(tmp_path / path), samples), abs=1e-5)


@pytest.mark.parametrize("case", L2_CASES)
def test_grow_then_shrink_is_the_identity(case, tmp_path, text, capsys):
    golden_checkpoint(case, tmp_path / "a")
    assert grow(tmp_path / "a", tmp_path / "b", "qkv=96,proj=80,ffn=300") == 0
    options = ["--shrink", "qkv=64,proj=64,ffn=256", "--data", text, "--verify"]
    assert tool(tmp_path / "b", tmp_path / "c", *options, "--target-tensor-parallel-size", 2) == 0
    first, last = CheckpointReader(tmp_path / "a"), CheckpointReader(tmp_path / "c")
    assert list(differences(first, last)) == []
    assert first.record.model == last.record.model
    assert first.record.tau == last.record.tau
    assert "max |delta logit| before and after: 0 " in capsys.readouterr().out.splitlines()[-2]


def test_shrinking_drops_what_does_least(tmp_path, text):
    """Dropping the least important half costs less than dropping the most important one."""
    golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")
    assert tool(tmp_path / "a", tmp_path / "b", "--shrink", "ffn=128", "--data", text, "--verify") == 0
    model, smaller = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    samples = read_samples(text, vocab_size=256, seq_length=SEQ_LENGTH, num_tokens=16384)
    importance = token_importance(model, samples)["layers.1.ffn"]
    kept = importance.topk(128).indices.sort().values
    old, new = (m.transformer.get_parameter("layers.1.ffn.key_tokens") for m in (model, smaller))
    assert torch.equal(old[kept], new)
    assert smaller.record.lineage[0].kinds == {"ffn": [256, 128]}
    with torch.no_grad():
        x = torch.randn(9, 64)
        module = model.transformer.pattentions()["layers.1.ffn"]
        assert torch.allclose(module.weights(x) @ module.value_tokens, module(x), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shrink", "ffn=128"], "--shrink needs --data"),
        (["--shrink", "ffn=256", "--data", "TEXT"], "layers.0.ffn has only 256 tokens"),
        (["--shrink", "ffn@0=12", "--data", "TEXT"], "all layers shrink equally"),
        (["--shrink", "ffn=128", "--data", "TEXT", "--grow", "qkv=128"], "run the tool twice"),
    ],
)
def test_shrinking_that_cannot_be(tmp_path, text, capsys, options, message):
    golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")
    assert tool(tmp_path / "a", tmp_path / "b", *(text if part == "TEXT" else part for part in options)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_vocabulary_is_padded_again(tmp_path):
    ids = golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")["input_ids"]
    old = load_model(tmp_path / "a")
    rows = old.config.padded_vocab_size
    assert tool(tmp_path / "a", tmp_path / "b", "--make-vocab-size-divisible-by", rows + 3, "--verify") == 0
    assert tool(tmp_path / "b", tmp_path / "c", "--make-vocab-size-divisible-by", 1, "--verify") == 0
    with torch.no_grad():
        for path, count in (("b", rows + 3), ("c", old.config.vocab_size)):
            logits = load_model(tmp_path / path)(ids)
            assert logits.shape[-1] == count
            assert torch.equal(logits[..., : old.config.vocab_size], old(ids)[..., : old.config.vocab_size])


def test_a_stage_file_says_the_same_as_options(tmp_path):
    golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")
    (tmp_path / "stage.yaml").write_text("ffn_tokens: {'0': 300, '1': 400}\ninit: zero_key\nrewarmup_iters: 9\n")
    assert tool(tmp_path / "a", tmp_path / "b", "--stage", tmp_path / "stage.yaml") == 0
    assert grow(tmp_path / "a", tmp_path / "c", "ffn@0=300,ffn@1=400", "--rewarmup-iters", 9) == 0
    one, other = CheckpointReader(tmp_path / "b"), CheckpointReader(tmp_path / "c")
    assert list(differences(one, other)) == []
    assert one.record == other.record
    (tmp_path / "stage.yaml").write_text("fnn_tokens: 300\n")
    assert tool(tmp_path / "a", tmp_path / "d", "--stage", tmp_path / "stage.yaml") == 1


def test_a_stage_file_names_layers_by_number_and_options_add_up(tmp_path):
    golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")
    (tmp_path / "stage.yaml").write_text("ffn_tokens: {0: 300, 1: 400}\nproj_tokens: 80\n")
    assert tool(tmp_path / "a", tmp_path / "b", "--stage", tmp_path / "stage.yaml") == 0
    assert tool(tmp_path / "a", tmp_path / "c", "--grow", "ffn@0=300,ffn@1=400", "--grow", "proj=80") == 0
    assert list(differences(CheckpointReader(tmp_path / "b"), CheckpointReader(tmp_path / "c"))) == []


def test_a_stage_file_that_is_no_yaml_is_one_line(tmp_path, capsys):
    golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")
    (tmp_path / "stage.yaml").write_text("a: [1\n b: :\n")
    assert tool(tmp_path / "a", tmp_path / "b", "--stage", tmp_path / "stage.yaml") == 1
    error = capsys.readouterr().err
    assert "stage.yaml: not valid YAML" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("number", ["0", "-5", "1.5", "many"])
def test_a_number_of_tokens_is_above_0(tmp_path, capsys, number):
    with pytest.raises(SystemExit) as left:
        tool(tmp_path / "a", tmp_path / "b", f"--data-tokens={number}")
    assert left.value.code == 2
    assert f"argument --data-tokens: is {number}: write an integer above 0" in capsys.readouterr().err


def test_softmax_is_refused_with_the_reason(tmp_path, capsys):
    golden_checkpoint("C_softmax", tmp_path / "a")
    assert grow(tmp_path / "a", tmp_path / "b", "ffn=512") == 1
    assert "exp(0) = 1" in capsys.readouterr().err


def test_what_verification_finds_is_told_by_the_exit_code(tmp_path, capsys, monkeypatch):
    golden_checkpoint("A_l2_norm_gelu", tmp_path / "a")
    monkeypatch.setattr(resharding, "EXACT", -1.0)
    assert grow(tmp_path / "a", tmp_path / "b", "ffn=512") == 3
    assert "the logits moved by" in capsys.readouterr().err
