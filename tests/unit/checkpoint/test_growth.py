"""What growth adds, what it leaves as it was, and what it refuses."""

import pytest
import torch

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.growth import GrowthPlan, parse_growth, plan_growth, token_kind
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.parallel.random import normal_rows
from tests.unit.checkpoint.toy import (
    GROUPS,
    HIDDEN,
    LAYERS,
    TAU,
    TOKENS,
    metadata,
    random_tensors,
    read_all,
    save,
    target,
)

GROWN = {"qkv": 18, "proj": 24, "ffn": 90}
REQUEST = "qkv=18,proj=24,ffn=90"
STD = 2 / (LAYERS * HIDDEN**0.5)


def grow(source, root, request, layout=(1, 1)):
    """The grown checkpoint's directory."""
    reader = CheckpointReader(source)
    return reshard(reader, root, target(*layout), plan_growth(reader.metadata, request), show_progress=False)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (3, 3), (6, 2)], ids=str)
def test_old_rows_stay_new_keys_are_zero_new_values_are_drawn(tmp_path, layout):
    tensors = random_tensors()
    grown = read_all(grow(save(tmp_path / "base", tensors, (2, 2, 2)), tmp_path / "grown", REQUEST, layout))
    for group in GROUPS:
        for name, old in tensors[group].items():
            kind, new = token_kind(name), grown[group][name]
            assert torch.equal(new[: len(old)], old)
            if kind is None:
                assert new.shape == old.shape
                continue
            assert new.shape == (GROWN[kind], HIDDEN)
            expected = torch.zeros(GROWN[kind] - len(old), HIDDEN)
            if group == "model" and name.endswith(".value_tokens"):
                expected = normal_rows(name, 7, len(old), GROWN[kind], HIDDEN, STD)
                assert 0.5 * STD < expected.std() < 1.5 * STD
            assert torch.equal(new[len(old) :], expected)


def test_kinds_left_out_stay(tmp_path):
    tensors = random_tensors()
    grown = read_all(grow(save(tmp_path / "base", tensors), tmp_path / "grown", "ffn=72"))
    for name, old in tensors["model"].items():
        assert grown["model"][name].shape[0] == (72 if token_kind(name) == "ffn" else old.shape[0])


def test_growth_composes(tmp_path):
    base = save(tmp_path / "base", random_tensors())
    between = grow(base, tmp_path / "between", "qkv=14,ffn=48", (2, 1))
    in_two = CheckpointReader(grow(between, tmp_path / "two", REQUEST, (1, 3)))
    in_one = CheckpointReader(grow(base, tmp_path / "one", REQUEST))
    for group in GROUPS:
        for name in in_one.names(group):
            rows = in_one.shape(group, name)[0]
            assert torch.equal(in_one.read_rows(group, name, 0, rows), in_two.read_rows(group, name, 0, rows))
    assert in_two.metadata["model"] == in_one.metadata["model"]
    assert [event["kinds"] for event in in_two.metadata["lineage"]] == [
        {"qkv": [12, 14], "ffn": [36, 48]},
        {"qkv": [14, 18], "proj": [12, 24], "ffn": [48, 90]},
    ]


def test_metadata_says_what_happened(tmp_path):
    grown = CheckpointReader(grow(save(tmp_path / "base", random_tensors()), tmp_path / "grown", "ffn=90")).metadata
    before = metadata()
    assert grown["tau"] == TAU  # kept, not the root of the new number of tokens
    assert grown["training"] == before["training"]
    assert grown["model"] == grown["config"]["model"] == {**before["model"], "ffn_tokens": 90}
    assert grown["lineage"] == [
        {"step": 100, "samples": 6400, "tokens": 51200, "kinds": {"ffn": [36, 90]}, "init": "zero_key", "seed": 7}
    ]


def test_metadata_given_is_left_as_it_was():
    given = metadata()
    plan_growth(given, REQUEST).grown_metadata(given)
    assert given == metadata()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("fnn=4096", "unknown kind 'fnn'; did you mean ffn?"),
        ("width=4096", "unknown kind 'width'; known are qkv, proj, ffn"),
        ("ffn", "ffn: write KIND=NUMBER, such as ffn=4096"),
        ("ffn=many", "ffn=many: write KIND=NUMBER"),
        ("ffn=-1", "ffn=-1: write KIND=NUMBER"),
        ("ffn=1e3", "write KIND=NUMBER"),
        ("", "unknown kind ''"),
        ("ffn=40,ffn=50", "ffn is given twice, as 40 and 50"),
    ],
)
def test_requests_that_make_no_sense(request_, message):
    with pytest.raises(CheckpointError) as caught:
        parse_growth(request_)
    assert message in str(caught.value)


def test_requests_that_do():
    assert parse_growth("qkv=18, ffn = 90") == {"qkv": 18, "ffn": 90}


@pytest.mark.parametrize("number", [0, 35, 36])
def test_shrinking_is_refused(number):
    with pytest.raises(
        CheckpointError,
        match="has 36 tokens already; growth only adds, shrinking is not supported: ask for more than 36",
    ):
        plan_growth(metadata(), f"ffn={number}")


def test_softmax_is_refused_with_the_reason():
    facts = metadata()
    facts["model"]["norm_activation"] = "softmax"
    with pytest.raises(CheckpointError, match=r"exp\(0\) = 1"):
        plan_growth(facts, REQUEST)


def test_dead_growth_is_refused_with_the_reason():
    with pytest.raises(CheckpointError, match="both zero is dead: neither ever receives a gradient"):
        GrowthPlan({"ffn": (36, 72)}, 0.0, 7)


def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path):
    facts = metadata()
    facts["model"]["ffn_tokens"] = 30
    base = save(tmp_path / "base", random_tensors(), facts=facts)
    with pytest.raises(
        CheckpointError, match=r"ffn\.key_tokens has 36 rows, the checkpoint's metadata says ffn_tokens"
    ):
        grow(base, tmp_path / "grown", "ffn=72")
    assert not (tmp_path / "grown").exists()


def test_kinds_of_names():
    assert {
        kind: token_kind(f"layers.11.{module}.key_tokens")
        for kind, module in [("qkv", "attention.value"), ("proj", "attention.proj"), ("ffn", "ffn")]
    } == {kind: kind for kind in TOKENS}
    for name in (
        "embedding.weight",
        "final_norm.bias",
        "layers.1.ffn.other",
        "xlayers.1.ffn.key_tokens",
        "head.weight",
    ):
        assert token_kind(name) is None
