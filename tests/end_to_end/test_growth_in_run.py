"""Growth within a run: the same, bit for bit, as to stop, grow with the tool and start again."""

import json

import pytest
import torch
import yaml

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.commands import plot_run
from megatron_tf.config import to_dict
from tests.support.commands import make_run, run
from tests.support.runs import derive_run

STAGE = {
    "at_step": 3,
    "ffn_tokens": 136,
    "qkv_tokens": {"0": 32, "1-3": 40},
    "insert_layers": [1],
    "rewarmup_iters": 2,
    "old_tokens_lr_scale": 0.5,
}
LAYOUTS = {
    "one": (1, []),
    "tp": (2, ["--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true"]),
    "pp": (2, ["--parallel.pipeline_model_parallel_size=2"]),
    "dp": (2, []),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("growth"), training={"train_iters": 6}, optimizer={"lr_decay_iters": 6, "lr": 1e-3}
    )


def train(config, *options, **how):
    done = run("megatron_tf.pretrain", config, *options, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def assert_same(one, other):
    left, right = CheckpointReader(one), CheckpointReader(other)
    assert list(differences(left, right)) == []
    for key in ("tau", "training", "lineage", "generations", "model"):
        assert getattr(left.record, key) == getattr(right.record, key)


@pytest.mark.parametrize(
    ("layout", "init"),
    [*((layout, init) for layout in LAYOUTS for init in ("zero_key", "duplicate")), ("tp", "rotated_key")],
)
def test_it_is_the_same_as_stop_grow_and_start_again(folder, layout, init):
    ranks, options = LAYOUTS[layout]
    name = f"{layout}-{init}"
    stage = {**STAGE, "init": init}
    if init == "duplicate":
        stage |= {"qkv_tokens": {"2": 64}, "moments": "reset"}
    if init == "rotated_key":
        stage |= {"qkv_tokens": {"2": 72}}
    check_against_offline(folder, name, stage, ranks=ranks, options=options)


@pytest.mark.parametrize("multiple", [2, 1.5])
def test_width_layers_and_tokens_in_one_stage_are_the_same_too(folder, multiple):
    sizes = [f"--parallel.{axis}_model_parallel_size=2" for axis in ("tensor", "pipeline")]
    stage = {
        "at_step": 3,
        "hidden_multiple": multiple,
        "num_layers": 6,
        "layer_init": "copy_zero",
        "ffn_tokens": 128,
        "init": "duplicate",
        "rewarmup_iters": 2,
    }
    options = [*sizes, "--parallel.sequence_parallel=true"]
    check_against_offline(folder, f"width-{multiple}", stage, ranks=4, options=options)


LAYERS = {
    "full copies": {"num_layers": 5, "layer_order": "stacked", "layer_init": "copy", "ffn_tokens": 96},
    "copies with zeros": {"num_layers": 6, "layer_order": "middle", "layer_init": "copy_zero", "qkv_tokens": {"5": 48}},
    "copies without moments": {"insert_layers": [0, 3], "layer_init": "copy", "adam_state": "reset_new"},
}


@pytest.mark.parametrize("layers", LAYERS)
def test_layers_are_the_same_too(folder, layers):
    """On two tensor-parallel times two pipeline ranks, where copies come from another stage's layers."""
    sizes = [f"--parallel.{axis}_model_parallel_size=2" for axis in ("tensor", "pipeline")]
    stage = {"at_step": 3, "rewarmup_iters": 2, "new_tokens_lr_scale": 2.0, "rewarmup": "new", **LAYERS[layers]}
    check_against_offline(folder, layers.replace(" ", "-"), stage, ranks=4, options=sizes)


def test_hidden_units_of_a_plain_transformer_are_the_same_too(folder):
    model = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
    stage = {"at_step": 3, "ffn_tokens": 128, "mlp_init": "duplicate", "num_layers": 4, "layer_init": "copy"}
    ranks, options = LAYOUTS["tp"]
    check_against_offline(folder, "hidden-units", stage, ranks=ranks, options=options, model=model)


def check_against_offline(folder, name, stage, *, ranks, options, model=None):
    """Compare a run that grows with one that is stopped, grown by the tool and started again."""
    old = model or {}
    inside = train(derive_run(folder, f"{name}-inside", growth=[stage], model=old), *options, ranks=ranks)
    assert "grown to" in inside.stdout
    before = derive_run(folder, f"{name}-before", training={"train_iters": 3}, model=old)
    train(before, *options, ranks=ranks)
    (folder / "stage.yaml").write_text(yaml.safe_dump(stage))
    arguments = ["--load", folder / f"{name}-before", "--save", folder / f"{name}-grown", "--verify"]
    grown = run("tools/reshard_checkpoint.py", *arguments, "--stage", folder / "stage.yaml")
    assert grown.returncode == 0, grown.stderr
    model = to_dict(CheckpointReader(folder / f"{name}-grown").record.model)
    load = {"load": str(folder / f"{name}-grown")}
    train(derive_run(folder, f"{name}-after", model=model, checkpoint=load), *options, ranks=ranks)
    assert_same(folder / f"{name}-inside", folder / f"{name}-after")


def test_growth_by_utility_is_the_same_as_with_the_tool(folder):
    """On two ranks; the old weights are perturbed too. The log has the advice once."""
    ranks, options = LAYOUTS["tp"]
    data = yaml.safe_load((folder / "run.yaml").read_text())["data"]["data_path"][-1]
    stage = {**STAGE, "init": "duplicate_by_utility", "utility_data": str(data), "shrink_factor": 0.9}
    stage |= {"perturb_std": 0.01, "tensor_model_parallel_size": 2}
    inside = train(derive_run(folder, "utility-inside", growth=[stage]), *options, ranks=ranks)
    assert inside.stdout.count("growth factor") == 1
    train(derive_run(folder, "utility-before", training={"train_iters": 3}), *options, ranks=ranks)
    (folder / "stage.yaml").write_text(yaml.safe_dump(stage))
    arguments = ["--load", folder / "utility-before", "--save", folder / "utility-grown", "--verify"]
    grown = run("tools/reshard_checkpoint.py", *arguments, "--stage", folder / "stage.yaml")
    assert grown.returncode == 0, grown.stderr
    assert grown.stdout.count("growth factor") == 1
    model = to_dict(CheckpointReader(folder / "utility-grown").record.model)
    load = {"load": str(folder / "utility-grown")}
    train(derive_run(folder, "utility-after", model=model, checkpoint=load), *options, ranks=ranks)
    assert_same(folder / "utility-inside", folder / "utility-after")


def test_data_for_the_utility_is_checked_before_the_first_step(folder):
    stage = {"at_step": 3, "ffn_tokens": 128, "init": "duplicate_by_utility", "utility_data": str(folder / "gone")}
    done = run("megatron_tf.pretrain", derive_run(folder, "no-data", growth=[stage]))
    assert done.returncode == 1
    assert "growth[0]: utility_data: " in done.stderr
    assert not (folder / "no-data.jsonl").exists()


def test_two_stages_one_by_tokens_and_a_restart_between_them(folder):
    growth = [{"at_step": 2, "ffn_tokens": 96}, {"at_tokens": 4 * 8 * 16, "ffn_tokens": 128, "rewarmup_iters": 2}]
    train(derive_run(folder, "straight", growth=growth))
    short = derive_run(folder, "stopped", growth=growth, training={"train_iters": 3})
    train(short)
    assert CheckpointReader(folder / "stopped").record.model.ffn_tokens == 96
    resumed = train(derive_run(folder, "stopped", growth=growth))
    assert "at step 3" in resumed.stdout
    assert_same(folder / "straight", folder / "stopped")
    events = [json.loads(line) for line in (folder / "straight.jsonl").read_text().splitlines()]
    assert [line["step"] for line in events if line.get("event") == "growth"] == [2, 4]
    rates = {line["step"]: line["learning_rate"] for line in events if "loss" in line}
    assert rates[5] < 0.6 * rates[4]  # the re-warm-up
    assert rates[3] == pytest.approx(1e-3 * 0.75, rel=1e-6)  # cosine, no re-warm-up in the first stage
    stages = plot_run.read_stages(folder / "straight.jsonl")
    assert [sorted(stage.steps) for stage in stages] == [[1, 2], [3, 4], [5, 6]]


def test_frozen_tokens_stay_as_they_are(folder):
    growth = [{"at_step": 3, "ffn_tokens": 128, "qkv_tokens": 64, "proj_tokens": 48, "old_tokens_lr_scale": 0.0}]
    train(derive_run(folder, "frozen", growth=growth), ranks=2)
    steps = [CheckpointReader(folder / "frozen" / f"step_0000000{step}") for step in (3, 6)]
    for group in ("model", "exp_avg", "exp_avg_sq"):
        for name in steps[0].names(group):
            rows = steps[0].shape(group, name)[0]
            before, after = (reader.read_rows(group, name, start=0, stop=rows) for reader in steps)
            assert torch.equal(before, after) == name.startswith("layers."), (group, name)
            if name.startswith("layers."):
                new = steps[1].read_rows(group, name, start=rows, stop=steps[1].shape(group, name)[0])
                assert (new != 0).all() or name.endswith("key_tokens")
                assert new.abs().sum() > 0


def test_the_layout_changes_with_the_growth(folder):
    """The run ends with exit code 75; the same command resumes in the new layout with the same result."""
    stage = {"at_step": 3, "ffn_tokens": 128, "tensor_model_parallel_size": 2}
    config = derive_run(folder, "moved", growth=[stage])
    alone = run("megatron_tf.pretrain", config)
    assert alone.returncode == 1
    assert "growth[0]: the world has 1 rank(s), but the layout" in alone.stderr  # before the first step
    stopped = run("megatron_tf.pretrain", config, ranks=2)
    assert stopped.returncode == 75
    assert "start the same command again" in stopped.stdout
    wrong = run("megatron_tf.pretrain", config)
    assert wrong.returncode == 1
    assert "needs a multiple of 2" in wrong.stderr
    assert "growth factor" not in stopped.stdout
    again = train(config, ranks=2)
    assert "tp 2" in again.stdout
    assert again.stdout.count("growth factor") == 1  # the stage begins in this job
    train(derive_run(folder, "stayed", growth=[{"at_step": 3, "ffn_tokens": 128}]))
    one, other = CheckpointReader(folder / "moved"), CheckpointReader(folder / "stayed")
    for name in one.names("model"):
        rows = [
            reader.read_rows("model", name, start=0, stop=reader.shape("model", name)[0]) for reader in (one, other)
        ]
        assert torch.allclose(*rows, rtol=1e-4, atol=1e-6), name


def test_torchrun_starts_it_again_by_itself(folder):
    stage = {"at_step": 3, "ffn_tokens": 128, "pipeline_model_parallel_size": 2}
    config = derive_run(folder, "restarted", growth=[stage])
    done = train(config, ranks=2, restarts=1)
    assert "dp 2" in done.stdout
    assert "pp 2" in done.stdout
    assert CheckpointReader(folder / "restarted").step == 6


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ([{"ffn_tokens": 128}], r"growth[0]: give either at_step or at_tokens"),
        ([{"at_step": 1, "ffn_tokens": 32}], "growth[0]: ffn_tokens=32: layer 0 already has 64"),
        ([{"at_step": 1, "fnn_tokens": 128}], "did you mean 'ffn_tokens'?"),
        (
            [{"at_step": 2, "ffn_tokens": 128}, {"at_step": 1, "ffn_tokens": 256}],
            "at_step must increase from stage to stage",
        ),
        ([{"at_step": 1, "ffn_tokens": 129, "tensor_model_parallel_size": 2}], "ffn_tokens (129) must be divisible"),
    ],
)
def test_growth_that_cannot_be_is_refused_before_the_run(folder, growth, message):
    done = run("megatron_tf.pretrain", derive_run(folder, "wrong", growth=growth))
    assert done.returncode == 1
    assert message in done.stderr
    assert not (folder / "wrong").exists()


def evaluations(folder, name, *options):
    """Train with a growth at step 3; return (step, parameters, validation loss) of each evaluation."""
    stage = {"at_step": 3, "ffn_tokens": 136, "qkv_tokens": 40}
    train(derive_run(folder, name, growth=[stage]), "--training.eval_iters=1", *options)
    found, parameters = [], 0
    for line in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()):
        parameters = line.get("parameters", parameters)
        if "validation_loss" in line:
            found.append((line["step"], parameters, line["validation_loss"]))
    return found


def test_evaluations_around_a_growth_have_the_losses_of_those_at_every_step(folder):
    """Zero keys keep the output, so the loss is the same right before and right after the growth."""
    always = evaluations(folder, "always", "--training.eval_interval=1")
    some = evaluations(folder, "some", "--training.eval_interval=100", "--training.eval_after_growth=[0, 2]")
    assert [step for step, _, _ in some] == [3, 3, 5, 6]
    (_, small, before), (_, large, after) = some[:2]
    assert small < large
    assert after == pytest.approx(before, abs=1e-6)
    assert [found for found in some if found[:2] != (3, large)] == [found for found in always if found[0] in (3, 5, 6)]


def test_evaluations_around_a_growth_need_an_evaluation_interval(folder):
    done = run("megatron_tf.pretrain", folder / "run.yaml", "--training.eval_after_growth=[0]")
    assert done.returncode == 1
    assert "eval_after_growth needs eval_interval: set it, for example to train_iters" in done.stderr
