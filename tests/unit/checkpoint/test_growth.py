"""What growth adds, what it leaves as it was, and what it refuses: tensors and metadata of a toy checkpoint."""

import json
import re
from dataclasses import replace

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generation, Generations, Run
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.checkpoint.schedule_start import ScheduleStart
from megatron_tf.checkpoint.vocabulary import pad_vocabulary
from megatron_tf.config import GrowthStage, ModelConfig, ScheduleConfig, parse_token_option, to_dict
from megatron_tf.growth.grow import grow
from megatron_tf.growth.shrink import shrink
from megatron_tf.tokenformer.initial_values import normal_rows
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support.toy import (
    GROUPS,
    HIDDEN,
    LAYERS,
    MODEL,
    MODULES,
    TAU,
    TOKENS,
    random_tensors,
    read_all,
    record,
    save,
    target,
)

GROWN = {"qkv": 18, "proj": 24, "ffn": 90}
STAGE = GrowthStage(qkv_tokens=18, proj_tokens=24, ffn_tokens=90, init="zero_key")
STD = 2 / (LAYERS * HIDDEN**0.5)


def grow_to(source, root, stage, layout=(1, 1)):
    """The grown checkpoint's directory."""
    reader = CheckpointReader(source, check_at_end=True)
    return reshard(grow(reader, stage), root, target(*layout), check_source=reader.verify)


def kind_of(name):
    parameter = model_parameters(ModelConfig(**MODEL))[name]
    return parameter.kind if parameter.has_units else None


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (3, 3), (6, 2)], ids=str)
def test_old_rows_stay_new_keys_are_zero_new_values_are_drawn(tmp_path, layout):
    tensors = random_tensors()
    grown = read_all(grow_to(save(tmp_path / "base", tensors, (2, 2, 2)), tmp_path / "grown", STAGE, layout))
    for group in GROUPS:
        for name, old in tensors[group].items():
            kind, new = kind_of(name), grown[group][name]
            assert torch.equal(new[: len(old)], old)
            if kind is None:
                assert new.shape == old.shape
                continue
            assert new.shape == (GROWN[kind], HIDDEN)
            expected = torch.zeros(GROWN[kind] - len(old), HIDDEN)
            if group == "model" and name.endswith(".value_tokens"):
                expected = normal_rows(name, seed=7, start=len(old), stop=GROWN[kind], columns=HIDDEN, std=STD)
                assert 0.5 * STD < expected.std() < 1.5 * STD
            assert torch.equal(new[len(old) :], expected)


def test_the_transformed_checkpoint_is_what_is_written(tmp_path):
    source = CheckpointReader(save(tmp_path / "base", random_tensors()))
    stage = GrowthStage(ffn_tokens=100, init="duplicate", insert_layers=[1, 3], moments="reset")
    transformed, written = grow(source, stage), read_all(grow_to(tmp_path / "base", tmp_path / "grown", stage, (2, 2)))
    for group in transformed.groups():
        assert transformed.names(group) == list(written[group])
        for name, whole in written[group].items():
            for start, stop in [(0, len(whole)), (0, 1), (len(whole) // 2, len(whole)), (1, len(whole) - 1)]:
                assert torch.equal(transformed.read_rows(group, name, start=start, stop=stop), whole[start:stop])
    with pytest.raises(CheckpointError, match=r"has 100 rows, \[90, 101\) are requested"):
        transformed.read_rows("model", "layers.0.ffn.key_tokens", start=90, stop=101)


def test_kinds_left_out_stay(tmp_path):
    tensors = random_tensors()
    grown = read_all(grow_to(save(tmp_path / "base", tensors), tmp_path / "grown", GrowthStage(ffn_tokens=72)))
    for name, old in tensors["model"].items():
        assert grown["model"][name].shape[0] == (72 if kind_of(name) == "ffn" else old.shape[0])


def test_layers_grow_apart(tmp_path):
    base = save(tmp_path / "base", random_tensors())
    stage = GrowthStage(ffn_tokens={"0-1": 48, "2": 60})
    grown = CheckpointReader(grow_to(base, tmp_path / "grown", stage, (2, 1)))
    assert grown.record.model.ffn_tokens == [48, 48, 60]
    assert [grown.shape("exp_avg", f"layers.{i}.ffn.value_tokens")[0] for i in range(LAYERS)] == [48, 48, 60]
    again = grow(grown, GrowthStage(ffn_tokens=60))
    assert again.record.model.ffn_tokens == 60
    assert again.record.lineage[-1].kinds == {"ffn": [[48, 48, 60], 60]}


def test_growth_composes(tmp_path):
    base = save(tmp_path / "base", random_tensors())
    between = grow_to(base, tmp_path / "between", GrowthStage(qkv_tokens=14, ffn_tokens=48), (2, 1))
    in_two = CheckpointReader(grow_to(between, tmp_path / "two", STAGE, (1, 3)))
    in_one = CheckpointReader(grow_to(base, tmp_path / "one", STAGE))
    for group in GROUPS:
        for name in in_one.names(group):
            rows = in_one.shape(group, name)[0]
            assert torch.equal(
                in_one.read_rows(group, name, start=0, stop=rows), in_two.read_rows(group, name, start=0, stop=rows)
            )
    assert in_two.record.model == in_one.record.model
    assert [event.kinds for event in in_two.record.lineage] == [
        {"qkv": [12, 14], "ffn": [36, 48]},
        {"qkv": [14, 18], "proj": [12, 24], "ffn": [48, 90]},
    ]


def test_metadata_says_what_happened(tmp_path):
    stage = GrowthStage(ffn_tokens=90, init="zero_key", rewarmup_iters=5, old_tokens_lr_scale=0.25)
    grown = CheckpointReader(grow_to(save(tmp_path / "base", random_tensors()), tmp_path / "grown", stage)).record
    before = record()
    assert grown.tau == TAU  # kept, not the root of the new number of tokens
    assert grown.training == before.training
    assert to_dict(grown.model) == grown.config["model"] == {**to_dict(before.model), "ffn_tokens": 90}
    assert [event.to_json() for event in grown.lineage] == [
        {"step": 100, "samples": 6400, "tokens": 51200, "kinds": {"ffn": [36, 90]}, "init": "zero_key", "seed": 7}
    ]
    # the embedding is neither old nor new; the learning rate of old rows differs
    for name, parameter in model_parameters(grown.model).items():
        runs = grown.all_generations.runs(name, parameter.shape[0])
        old = Generation(exp_avg_steps=100, exp_avg_sq_steps=100, rewarmup_iters=5)
        if parameter.layer is None:
            assert runs == [Run(parameter.shape[0], old)]
            continue
        slow = replace(old, lr_scale=0.25)
        new = [Run(54, Generation(growth=1, rewarmup_iters=5))] if parameter.kind == "ffn" else []
        assert runs == [Run(TOKENS[parameter.kind], slow), *new]


def test_a_schedule_counts_from_the_growth_and_replaces_that_of_the_stored_configuration(tmp_path):
    before = record()
    source = CheckpointReader(save(tmp_path / "base", random_tensors()))
    of_run = {"lr": 1.0, "lr_warmup_iters": 7, "weight_decay": 0.3}
    source.record = replace(before, config=before.config | {"optimizer": of_run})
    schedule = {"lr": 0.5, "min_lr": 0.25, "lr_decay_style": "linear"}
    with_schedule = GrowthStage(ffn_tokens=90, optimizer=schedule)
    grown = grow(source, with_schedule)
    others = {key: value for key, value in to_dict(ScheduleConfig(lr=1.0)).items() if key not in schedule}
    assert others["lr_warmup_iters"] == 0  # nothing is inherited
    assert grown.record.config["optimizer"] == {"weight_decay": 0.3, **schedule, **others}
    assert grown.record.schedule_start == ScheduleStart(step=100, tokens=51200)
    # a growth without a schedule keeps the one before, and so does resharding
    again = replace(grown.record, training=replace(before.training, step=200))
    grown.record = again
    later = grow(grown, GrowthStage(ffn_tokens=96))
    assert later.record.schedule_start == ScheduleStart(step=100, tokens=51200)
    assert later.record.config["optimizer"] == again.config["optimizer"]
    assert grow(source, GrowthStage(ffn_tokens=90)).record.schedule_start is None
    # a converted checkpoint has no optimizer section
    source.record = before
    assert grow(source, with_schedule).record.config["optimizer"] == schedule | others


def test_a_schedule_that_counts_from_a_growth_has_a_format_that_version_0_1_refuses(tmp_path):
    source = CheckpointReader(save(tmp_path / "base", random_tensors()))
    for number, start in enumerate((None, ScheduleStart(step=100, tokens=51200))):
        source.record = replace(record(), schedule_start=start)
        path = reshard(source, tmp_path / str(number), target(1, 1))
        assert json.loads((path / "manifest.json").read_text())["format_version"] == 1 + number


def test_metadata_given_is_left_as_it_was(tmp_path):
    source = CheckpointReader(save(tmp_path, random_tensors()))
    grow(source, GrowthStage(ffn_tokens=90, insert_layers=[0], moments="reset"))
    assert source.record == record()


def test_duplicates_share_out_values_and_moments(tmp_path):
    """Three copies and six zero keys; noise adds up to zero over the copies of a token."""
    tensors = random_tensors()
    source = CheckpointReader(save(tmp_path, tensors))
    grown = grow(source, GrowthStage(ffn_tokens=3 * 36 + 6, init="duplicate"))
    for group, key_scale, value_scale in [("model", 1, 1 / 3), ("exp_avg", 1 / 3, 1), ("exp_avg_sq", 1 / 9, 1)]:
        for side, scale in (("key", key_scale), ("value", value_scale)):
            name = f"layers.1.ffn.{side}_tokens"
            old, new = tensors[group][name], grown.read_rows(group, name, start=0, stop=114)
            copies = new[:108].unflatten(0, (3, 36))
            if (group, side) == ("model", "value"):
                noise = copies - scale * old
                assert 0.05 * STD < noise.std() < 0.5 * STD
                assert (copies[0] - copies[1]).abs().min() > 0
                assert noise.sum(0).abs().max() < 1e-6
                assert new[108:].std() > 0.5 * STD
            else:
                assert torch.equal(copies, (scale * old).expand(3, -1, -1))
                assert not new[108:].any()
    assert grown.record.tau["layers.1.ffn"] == pytest.approx(TAU["layers.1.ffn"] * 3**0.5)
    assert grown.record.tau["layers.1.attention.proj"] == TAU["layers.1.attention.proj"]


def test_random_growth_is_the_official_one(tmp_path):
    source = CheckpointReader(save(tmp_path, random_tensors()))
    grown = grow(source, GrowthStage(ffn_tokens=72, init="random"))
    name = "layers.2.ffn.key_tokens"
    drawn = normal_rows(name, seed=7, start=36, stop=72, columns=HIDDEN, std=0.02)
    assert torch.equal(grown.read_rows("model", name, start=36, stop=72), drawn)
    assert grown.record.tau["layers.2.ffn"] == 72**0.5
    assert not grown.read_rows("exp_avg", name, start=36, stop=72).any()


def test_new_layers_end_in_zeros_and_have_values_of_their_own(tmp_path):
    tensors = random_tensors()
    source = CheckpointReader(save(tmp_path, tensors))
    grown = grow(source, GrowthStage(insert_layers=[3, 1, 1]))
    assert grown.record.model.num_layers == 6
    assert grown.record.lineage[0].inserted_layers == [1, 2, 5]
    for old, new in {0: 0, 1: 3, 2: 4}.items():
        for group in GROUPS:
            rows = grown.read_rows(group, f"layers.{new}.ffn.key_tokens", start=0, stop=36)
            assert torch.equal(rows, tensors[group][f"layers.{old}.ffn.key_tokens"])
    drawn = []
    for new in (1, 2, 5):
        for module, kind in MODULES.items():
            value = grown.read_rows("model", f"layers.{new}.{module}.value_tokens", start=0, stop=TOKENS[kind])
            assert bool(value.any()) == (kind == "qkv")
            drawn.append(
                grown.read_rows("model", f"layers.{new}.{module}.key_tokens", start=0, stop=TOKENS[kind]).flatten()
            )
            assert 0.01 < drawn[-1].std() < 0.04
            assert not grown.read_rows("exp_avg", f"layers.{new}.{module}.key_tokens", start=0, stop=TOKENS[kind]).any()
            runs = grown.record.all_generations.runs(f"layers.{new}.{module}.key_tokens", TOKENS[kind])
            assert runs == [Run(TOKENS[kind], Generation(growth=1))]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)
    assert grown.names("model")[:2] == ["embedding.weight", "layers.0.attention.query.key_tokens"]
    assert grown.names("model")[-2:] == ["final_norm.weight", "final_norm.bias"]


def test_moments_can_be_reset(tmp_path):
    source = CheckpointReader(save(tmp_path, random_tensors()))
    grown = grow(source, GrowthStage(ffn_tokens=72, moments="reset"))
    for name in grown.names("exp_avg"):
        assert not grown.read_rows("exp_avg_sq", name, start=0, stop=grown.shape("exp_avg_sq", name)[0]).any()
    assert grown.record.training.adam_steps == 0
    assert grown.record.training.step == 100


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
        ("ffn=40,ffn=50", "ffn is given twice"),
        ("ffn@1=40,ffn=50", "ffn is given twice"),
        ("ffn=40,ffn@1=50", "ffn@1 is given twice"),
        ("ffn@1=40,ffn@1=50", "ffn@1 is given twice"),
    ],
)
def test_requests_that_make_no_sense(request_, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_token_option("--grow", request_)


def test_requests_that_do():
    assert parse_token_option("--grow", "qkv=18, ffn = 90") == {"qkv": 18, "ffn": 90}
    assert parse_token_option("--grow", "ffn@0-1=90,ffn@2=100") == {"ffn": {"0-1": 90, "2": 100}}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"ffn_tokens": 35}, r"ffn_tokens=35: layer 0 already has 36, and growth only adds tokens; .* --shrink"),
        ({"ffn_tokens": 36}, "adds nothing"),
        ({}, "adds nothing"),
        ({"ffn_tokens": {"3": 72}}, "layers '3' are out of range: the last one is 2"),
        ({"ffn_tokens": {"2-1": 72}}, "layers '2-1' are out of range"),
        ({"ffn_tokens": {"all": 72}}, "write layers as 3 or 0-5, not 'all'"),
        ({"insert_layers": [4]}, "insert_layers names layer 4, but the model has 3 layers"),
        ({"ffn_tokens": 71, "init": "duplicate"}, "needs at least 72; use zero_key"),
    ],
)
def test_growth_that_cannot_be(tmp_path, stage, message):
    with pytest.raises(CheckpointError, match=message):
        grow(CheckpointReader(save(tmp_path, random_tensors())), GrowthStage(**stage))


def test_softmax_is_refused_with_the_reason(tmp_path):
    facts = record().with_model(replace(record().model, norm_activation="softmax"))
    source = CheckpointReader(save(tmp_path, random_tensors(), facts=facts))
    with pytest.raises(CheckpointError, match=r"exp\(0\) = 1"):
        grow(source, STAGE)
    with pytest.raises(CheckpointError, match="only be duplicated exactly to a multiple of its 36 tokens"):
        grow(source, GrowthStage(ffn_tokens=73, init="duplicate"))
    grown = grow(source, GrowthStage(ffn_tokens=72, init="duplicate"))
    assert grown.record.tau["layers.0.ffn"] == 2 * TAU["layers.0.ffn"]


def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path):
    facts = record().with_model(replace(record().model, ffn_tokens=30))
    base = save(tmp_path / "base", random_tensors(), facts=facts)
    with pytest.raises(
        CheckpointError, match=r"ffn\.key_tokens has 36 rows, the checkpoint's metadata says ffn_tokens"
    ):
        grow_to(base, tmp_path / "grown", GrowthStage(ffn_tokens=72))
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize(
    "derive",
    [
        lambda source: grow(source, STAGE),
        lambda source: shrink(source, {"layers.0.ffn": [0]}),
        lambda source: pad_vocabulary(source, 7),
    ],
    ids=["growth", "shrinking", "padding"],
)
def test_a_tensor_that_is_no_parameter_of_the_model_is_named(tmp_path, derive):
    tensors = random_tensors()
    tensors["exp_avg"]["layers.1.ffn.other"] = torch.zeros(1, HIDDEN)
    source = CheckpointReader(save(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"exp_avg layers\.1\.ffn\.other is not a parameter of its model"):
        derive(source)


@pytest.mark.parametrize(("iters", "expected"), [(0, (5, 2)), (4, (4, 0))])
def test_a_warm_up_in_progress_ends_with_another_one_only(tmp_path, iters, expected):
    source = CheckpointReader(save(tmp_path / "base", random_tensors()))
    grown = grow(source, GrowthStage(ffn_tokens=90, init="zero_key", rewarmup_iters=5))
    table = [replace(generation, rewarmup_done=2) for generation in grown.record.all_generations.table]
    grown.record = grown.record.with_generations(Generations(tuple(table), grown.record.all_generations.rows))
    again = grow(grown, GrowthStage(ffn_tokens=96, init="zero_key", rewarmup_iters=iters)).record
    found = {(each.rewarmup_iters, each.rewarmup_done) for each in again.all_generations.table if each.growth < 2}
    assert found == {expected}
