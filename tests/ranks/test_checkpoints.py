"""Checkpoints between layouts: parameters and Adam's state bit for bit, resuming, resharding, growth."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import reshard_checkpoint, resharding
from megatron_tf.inference.model import load_model
from megatron_tf.training.run.checkpointing import new_record, save_state
from megatron_tf.training.run.resumable import open_resumable
from megatron_tf.training.run.resume import Resume
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.layouts import CASES, LAYOUTS, layout_config
from tests.support.training import random_batch

TOKENIZER = {"type": "none"}


def train(mesh, config, steps):
    """Train from where the checkpoint stands, if there is one; returns the state, its record and the losses."""
    run = Resume(config, mesh, tokenizer=TOKENIZER, build=lambda staged: build_state(staged, mesh)).restore()
    state, record, losses = run.state, run.record, []
    while record.training.step < steps:
        losses.append(train_step(state, random_batch(config, record.training.step, mesh), 1e-3).loss)
        record = record.after_step(8, 8 * 16, 0.0)
    return state, record, losses


def train_and_save(mesh, config, steps, root):
    """Train as above and save; returns the losses."""
    state, record, losses = train(mesh, config, steps)
    save_state(state, config, record, root=Path(root))
    return losses


def save_and_step(mesh, config, steps, root):
    """Train and save; returns the loss of the step after that."""
    state, record, _ = train(mesh, config, steps)
    save_state(state, config, record, root=Path(root))
    return train_step(state, random_batch(config, steps, mesh), 1e-3).loss


def logical_tensors(root):
    """Everything in a checkpoint, read with safetensors and JSON alone."""
    safe_open = pytest.importorskip("safetensors").safe_open
    directory = Path(root) / (Path(root) / "latest").read_text()
    manifest = json.loads((directory / "manifest.json").read_text())
    tensors = {}
    for group, entries in manifest["groups"].items():
        for name, entry in entries.items():
            parts = []
            for piece in entry["pieces"]:
                with safe_open(directory / piece["file"], "pt") as file:
                    parts.append(file.get_tensor(name))
            tensors[group, name] = torch.cat(parts)
    return tensors


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_any_layout_reads_what_any_other_wrote(rank_pool, tmp_path, untied):
    """Eight layouts in a ring: each loads what the one before saved and saves it again, without a step."""
    first = tmp_path / "start"
    rank_pool.run(train_and_save, 2, 2, 2, layout_config((2, 2, 2), True, untied), 2, first)
    expected, source = logical_tensors(first), first
    assert len(expected) % 3 == 0
    assert all(tensor.abs().sum() > 0 for (group, _), tensor in expected.items() if group != "model")
    for layout, sequence_parallel in CASES:
        target = tmp_path / f"{layout}-{sequence_parallel}"
        config = layout_config(layout, sequence_parallel, untied, checkpoint={"load": source})
        rank_pool.run(train_and_save, *layout, config, 2, target)
        assert_same_bits(logical_tensors(target), expected)
        source = target


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_a_resumed_run_continues_bit_for_bit(rank_pool, tmp_path, layout):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    sequence_parallel = layout[0] > 1
    expected = rank_pool.run(train_and_save, *layout, layout_config(layout, sequence_parallel), 6, straight)[0]
    config = layout_config(layout, sequence_parallel, checkpoint={"save": stopped})
    losses = rank_pool.run(train_and_save, *layout, config, 3, stopped)[0]
    losses += rank_pool.run(train_and_save, *layout, config, 6, stopped)[0]
    assert losses == expected
    assert_same_bits(logical_tensors(stopped), logical_tensors(straight))


VARIANTS = {
    "tied-fp32": (False, "fp32"),
    "untied-fp32": (True, "fp32"),
    "tied-bf16": (False, "bf16"),
    "untied-bf16": (True, "bf16"),
}
"""Name -> (whether the head is untied, type of activations; master weights and Adam moments are fp32)."""
GROWN = {"qkv_tokens": 48, "proj_tokens": 40, "ffn_tokens": 128}


def variant_config(layout, variant, **sections):
    untied, precision = VARIANTS[variant]
    return layout_config(layout, layout[0] > 1, untied, training={"precision": precision}, **sections)


@pytest.fixture(scope="module")
def trained_on(rank_pool, tmp_path_factory):
    """(layout, variant) -> a checkpoint of two steps on it, and the loss of its third step; each made once."""
    runs = {}

    def run(layout, variant):
        if (layout, variant) not in runs:
            root = tmp_path_factory.mktemp("trained")
            third = rank_pool.run(save_and_step, *layout, variant_config(layout, variant), 2, root)
            runs[layout, variant] = root, third[0]
        return runs[layout, variant]

    return run


@pytest.fixture(scope="module")
def trained(trained_on):
    return trained_on((2, 2, 1), "tied-fp32")[0]


def reshard(source, target, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(target), *options])


def test_there_and_back_gives_identical_tensors(trained, tmp_path):
    assert reshard(trained, tmp_path / "b", "--target-tensor-parallel-size", "4", "--verify") == 0
    there, back = ["--target-tensor-parallel-size", "2"], ["--target-pipeline-parallel-size", "2"]
    assert reshard(tmp_path / "b", tmp_path / "a", *there, *back, "--verify") == 0
    assert_same_bits(logical_tensors(tmp_path / "a"), logical_tensors(trained))


def test_models_too_large_for_the_memory_are_not_compared(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resharding, "usable_memory", lambda: 1000)
    assert reshard(trained, tmp_path / "grown", "--grow", "ffn=128", "--verify") == 0
    out = capsys.readouterr().out
    assert "the logits are not compared" in out
    assert "verified: all checksums match" in out


def target_options(layout):
    tensor, pipeline, _ = layout
    return ["--target-tensor-parallel-size", str(tensor), "--target-pipeline-parallel-size", str(pipeline)]


# all pairs of layouts for one variant; for each other one a target for each source, and each layout once as a target
TARGETS = {
    (source, variant): LAYOUTS if number == 0 else [LAYOUTS[(place + 2 + number) % len(LAYOUTS)]]
    for number, variant in enumerate(VARIANTS)
    for place, source in enumerate(LAYOUTS)
}
# of growth a target for each source and variant, and each layout once as a target; no two variants share a pair
GROWTH_PAIRS = [
    (source, LAYOUTS[(place + 2 + number) % len(LAYOUTS)], variant)
    for number, variant in enumerate(VARIANTS)
    for place, source in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("source", "variant"), TARGETS, ids=str)
def test_tensors_between_any_two_layouts(trained_on, tmp_path, source, variant):
    root, _ = trained_on(source, variant)
    old = logical_tensors(root)
    for target in TARGETS[source, variant]:
        assert reshard(root, tmp_path / str(target), *target_options(target)) == 0
        assert_same_bits(old, logical_tensors(tmp_path / str(target)))


@pytest.mark.parametrize(("source", "target", "variant"), GROWTH_PAIRS, ids=str)
def test_growth_between_any_two_layouts(rank_pool, trained_on, tmp_path, source, target, variant):
    """The logits and the next step's loss stay; old Adam rows are kept; every new key gets a gradient at that step."""
    (root, next_loss), grown, after = trained_on(source, variant), tmp_path / "grown", tmp_path / "after"
    growth = ["--grow", "qkv=48,proj=40,ffn=128", "--growth-init", "zero_key"]
    assert reshard(root, grown, *target_options(target), *growth, "--verify") == 0
    assert_only_appended(logical_tensors(root), logical_tensors(grown))
    ids = torch.arange(24)[None]
    assert (load_model(root)(ids) - load_model(grown)(ids)).abs().max() < 1e-6
    assert load_model(grown).record.lineage[0].kinds == {"qkv": [32, 48], "proj": [24, 40], "ffn": [64, 128]}
    config = variant_config(target, variant, model=dict(GROWN), checkpoint={"load": grown})
    losses = rank_pool.run(train_and_save, *target, config, 3, after)[0]
    assert losses == pytest.approx([next_loss], rel=1e-6 if variant.endswith("fp32") else 5e-3)
    assert_new_keys_learn(logical_tensors(root), logical_tensors(after))


@pytest.mark.parametrize(
    ("source", "target", "variant"),
    [((1, 1, 1), (2, 2, 2), "tied-fp32"), ((2, 1, 2), (1, 2, 1), "untied-fp32"), ((2, 2, 1), (2, 1, 1), "tied-bf16")],
    ids=str,
)
def test_rotated_keys_between_layouts(rank_pool, trained_on, tmp_path, source, target, variant):
    """The default init at twice the tokens: every layout gets the same bits, and the next step has the same loss."""
    (root, next_loss), grown, alone = trained_on(source, variant), tmp_path / "grown", tmp_path / "alone"
    model = {"qkv_tokens": 64, "proj_tokens": 48, "ffn_tokens": 192}
    for folder, layout in ((grown, target), (alone, (1, 1, 1))):
        assert reshard(root, folder, *target_options(layout), "--grow", "qkv=64,proj=48,ffn=192", "--verify") == 0
    assert_same_bits(logical_tensors(grown), logical_tensors(alone))
    record = load_model(grown).record
    assert record.lineage[0].init == "rotated_key"
    config = variant_config(target, variant, model=model, checkpoint={"load": grown})
    losses = rank_pool.run(train_and_save, *target, config, 3, tmp_path / "after")[0]
    assert losses == pytest.approx([next_loss], rel=2e-6 if variant.endswith("fp32") else 5e-3)
    old = logical_tensors(root)
    for (group, name), moment in logical_tensors(tmp_path / "after").items():
        if group == "exp_avg" and name.endswith("value_tokens"):
            rows = old[group, name].shape[0]
            assert (moment[rows:].abs().sum(1) > 0).all(), f"{name}: a new value got no gradient at the first step"


def assert_only_appended(old, new):
    for (group, name), grown in new.items():
        rows = old[group, name].shape[0]
        assert torch.equal(grown[:rows], old[group, name])
        if group != "model" or name.endswith("key_tokens"):
            assert not grown[rows:].any()
        elif name.endswith("value_tokens"):
            assert len(grown) > rows
            assert grown[rows:].all()


def assert_new_keys_learn(old, new):
    for (group, name), moment in new.items():
        if group == "exp_avg" and name.endswith("key_tokens"):
            rows = old[group, name].shape[0]
            assert (moment[rows:].abs().sum(1) > 0).all(), f"{name}: a new key got no gradient at the first step"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--grow", "fnn=128"], "did you mean ffn?"),
        (["--grow", "ffn=63"], "growth only adds"),
        (["--grow", "ffn=x"], "write KIND=NUMBER"),
        (["--insert-layers", "1,x"], "write layer indices, such as 0,6,6"),
        (["--stage", ".gitignore"], ".gitignore: expected the keys of a growth stage, found str"),
        (["--stage", "nowhere.yaml"], "nowhere.yaml: cannot read the configuration: No such file or directory"),
        (["--target-tensor-parallel-size", "3"], "4 attention heads cannot be shared equally by 3"),
        (["--target-pipeline-parallel-size", "5"], "every stage needs a layer"),
        (["--target-tensor-parallel-size", "4", "--grow", "ffn=66"], "66 rows, which 4 tensor-parallel ranks"),
    ],
)
def test_the_tool_explains_mistakes_and_writes_nothing(trained, tmp_path, capsys, options, message):
    assert reshard(trained, tmp_path / "x", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists() or not any((tmp_path / "x").iterdir())


def test_a_checkpoint_of_another_model_is_refused(trained):
    config = layout_config((1, 1, 1), model={"num_layers": 2}, checkpoint={"load": trained})
    with pytest.raises(CheckpointError, match="num_layers is 3 in the checkpoint, 2 in the configuration"):
        open_resumable(config, trained)


def damage(path, kind):
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped bit"])
@pytest.mark.parametrize("pattern", ["model-*", "exp_avg-*", "metadata.json", "manifest.json"])
def test_damage_is_found_and_named(trained, tmp_path, pattern, kind):
    copy = tmp_path / "copy"
    for file in trained.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(trained)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(trained)).write_bytes(file.read_bytes())
    CheckpointReader(copy).verify()
    victim = next(copy.glob(f"step_*/{pattern}"))
    damage(victim, kind)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(copy).verify()
    assert victim.name in str(caught.value)


def begin_again(mesh, config):
    """(step, what was found damaged, whether this rank's rows are those of the sound checkpoint)."""
    run = Resume(config, mesh, tokenizer=TOKENIZER, build=lambda staged: build_state(staged, mesh)).restore()
    sound = CheckpointReader(run.origin)
    same = all(
        torch.equal(sound.read_rows("model", shard.name, start=shard.start, stop=shard.stop), shard.tensor)
        for shard in run.state.shards
    )
    return run.record.training.step, run.damaged, same


@pytest.mark.parametrize("victim", ["model-pp01-tp00-dp00.safetensors", "manifest.json", "latest"])
def test_where_the_newest_is_damaged_all_ranks_take_the_one_before(rank_pool, tmp_path, victim):
    """Of tensors only the rank that reads the file sees the damage."""
    config = layout_config((1, 2, 1), checkpoint={"save": tmp_path})
    for steps in (1, 2, 3):
        rank_pool.run(train_and_save, 1, 2, 1, config, steps, tmp_path)
    damage(tmp_path / victim if victim == "latest" else tmp_path / "step_00000003" / victim, "flipped bit")
    expected = 3 if victim == "latest" else 2
    for step, damaged, same in rank_pool.run(begin_again, 1, 2, 1, config):
        assert (step, same) == (expected, True)
        assert victim == "latest" or (len(damaged) == 1 and victim in damaged[0])


def test_without_a_sound_checkpoint_no_run_starts_from_scratch(rank_pool, tmp_path):
    config = layout_config((1, 1, 1), checkpoint={"save": tmp_path})
    rank_pool.run(train_and_save, 1, 1, 1, config, 1, tmp_path)
    damage(tmp_path / "step_00000001" / "metadata.json", "flipped bit")
    (tmp_path / "latest").unlink()
    with pytest.raises(AssertionError, match=r"no valid checkpoint is left: .*metadata.json"):
        rank_pool.run(begin_again, 1, 1, 1, config)


def objects_on_every_rank(mesh, config, root):
    """What a save sends to every rank."""
    seen, gather = [], dist.all_gather_object

    def recording(objects, value, **options):
        gather(objects, value, **options)
        seen.extend(objects)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", recording)
        save_state(build_state(config, mesh), config, new_record(config, TOKENIZER), root=Path(root))
    return seen


def test_the_list_of_pieces_goes_to_the_first_rank_only(rank_pool, tmp_path):
    """With a thousand ranks it has a million entries; the others learn only whether any rank failed."""
    answers = rank_pool.run(objects_on_every_rank, 2, 1, 2, layout_config((2, 1, 2)), tmp_path)
    assert all(set(seen) == {None} for seen in answers)
