"""The schedules of growth stages in a run: the learning rate of every step, however often the run is interrupted."""

import json

import pytest
import yaml

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.config import to_dict
from tests.support.commands import make_run, run
from tests.support.runs import derive_run

STEPS, STEP_TOKENS = 15, 128
GROWN = (4, 10)
"""Steps after which the run grows."""
RATES = {
    "linear": [4, 8, 8, 5, 3, 6, 6, 4.5, 3, 1.5, 2, 4, 4, 3, 2],
    # the cosine of pi / 4 is sqrt(2) / 2, that of pi / 3 is 1 / 2
    "cosine": [4, 8, 8, 5, 3, 6, 6, 3 + 1.5 * 2**0.5, 3, 3 - 1.5 * 2**0.5, 2, 4, 4, 3.25, 1.75],
    "WSD": [4, 8, 8, 8, 3, 6, 6, 6, 6, 3, 2, 4, 4, 4, 2.5],
    "constant": [4, 8, 8, 8, 3, 6, 6, 6, 6, 6, 2, 4, 4, 4, 4],
}
"""Learning rate of each of the run's steps, times 10,000."""


def schedules(style, unit="iters"):
    """The schedules of the run and of its two stages, of 4, 6 and 5 steps; the ends of the last two by default."""
    step = {"iters": 1, "tokens": STEP_TOKENS}[unit]
    parts = [
        {"lr": 8e-4, "min_lr": 2e-4, "lr_decay": 4, "lr_warmup": 2, "lr_wsd_decay": 1},
        {"lr": 6e-4, "min_lr": 0.0, "lr_decay": 6, "lr_warmup": 2, "lr_wsd_decay": 2},
        {"lr": 4e-4, "min_lr": 1e-4, "lr_decay": 5, "lr_warmup_fraction": 0.4, "lr_wsd_decay": 2},
    ]
    found = []
    for part in parts:
        lengths = {
            f"{key}_{unit}": step * part[key] for key in ("lr_decay", "lr_warmup", "lr_wsd_decay") if key in part
        }
        others = {key: part[key] for key in ("lr", "min_lr", "lr_warmup_fraction") if key in part}
        found.append({"lr_decay_style": style, **others, **lengths})
        if style != "WSD":
            del found[-1][f"lr_wsd_decay_{unit}"]
        if unit == "iters" and len(found) > 1:
            del found[-1]["lr_decay_iters"]
    return found


def stages(of_first, of_second):
    """Two stages; both grow the model and set a schedule."""
    first = {"at_step": GROWN[0], "ffn_tokens": 96, "qkv_tokens": 40, "optimizer": of_first}
    return [first, {"at_step": GROWN[1], "insert_layers": [1], "optimizer": of_second}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("schedules"), training={"train_iters": STEPS})


def configured(folder, name, style="cosine", growth=None, **sections):
    of_run, *of_stages = schedules(style)
    growth = stages(*of_stages) if growth is None else growth
    return derive_run(folder, name, growth=growth, **{"optimizer": of_run, **sections})


def train(config, *options):
    done = run("megatron_tf.pretrain", config, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics_of(folder, name):
    """The loss, gradient norm and learning rate of each step; of its last attempt, if there are several."""
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines if "loss" in line}


def rates_of(folder, name):
    return [1e4 * rate for _, _, rate in metrics_of(folder, name).values()]


def assert_same(folder, name, other, steps=range(1, STEPS + 1)):
    left, right = CheckpointReader(folder / name), CheckpointReader(folder / other)
    assert list(differences(left, right)) == []
    for key in ("tau", "training", "lineage", "generations", "schedule_start", "model"):
        assert getattr(left.record, key) == getattr(right.record, key)
    straight = metrics_of(folder, other)
    assert metrics_of(folder, name) == {step: straight[step] for step in steps}


@pytest.fixture(scope="module")
def straight(folder):
    """A run that never stopped and saved after every step."""
    train(configured(folder, "straight", checkpoint={"save_interval": 1}))
    return "straight"


@pytest.mark.parametrize("style", RATES)
def test_each_schedule_counts_the_steps_since_its_growth(folder, style):
    train(configured(folder, f"{style}-iters", style))
    assert rates_of(folder, f"{style}-iters") == pytest.approx(RATES[style], rel=1e-12)
    start = CheckpointReader(folder / f"{style}-iters").record.schedule_start
    assert (start.step, start.tokens) == (10, 10 * STEP_TOKENS)


@pytest.mark.parametrize("style", RATES)
def test_each_schedule_counts_the_tokens_since_its_growth(folder, style):
    of_run, *of_stages = schedules(style, "tokens")
    growth = stages(*of_stages)
    for stage in growth:
        stage["at_tokens"] = STEP_TOKENS * stage.pop("at_step")
    train(derive_run(folder, f"{style}-tokens", growth=growth, optimizer=of_run))
    assert rates_of(folder, f"{style}-tokens") == pytest.approx(RATES[style], rel=1e-12)


def test_a_stage_without_a_schedule_continues_that_of_the_stage_before(folder):
    of_run, of_first, _ = schedules("linear")
    first, second = stages(of_first, None)
    train(derive_run(folder, "continued", growth=[first, second], optimizer=of_run))
    # six steps more: 9 of decay from 6 to 0
    expected = [*RATES["linear"][:6], *(6 * (1 - step / 9) for step in range(9))]
    assert rates_of(folder, "continued") == pytest.approx(expected, rel=1e-12)
    assert CheckpointReader(folder / "continued").record.schedule_start.step == GROWN[0]


@pytest.mark.parametrize("step", [4, 7, 13], ids=lambda step: f"after step {step}")
def test_a_run_resumed_at_any_step_is_the_same(folder, straight, step):
    name = f"resumed-{step}"
    load = {"load": str(folder / straight / f"step_{step:08d}")}
    train(configured(folder, name, checkpoint=load))
    assert_same(folder, name, straight, steps=range(step + 1, STEPS + 1))


def test_a_run_killed_at_the_growth_is_the_same(folder, straight):
    """It is killed between the save and the growth."""
    killer = folder / "killer.py"
    killer.write_text(
        "import os, signal, sys\n"
        "from megatron_tf import pretrain\n"
        "from megatron_tf.training.run import trainer\n"
        "trainer._open_next_stage = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pretrain.main(sys.argv[1:])\n"
    )
    config = configured(folder, "killed")
    for step in GROWN:
        assert run(killer, config).returncode == -9
        assert CheckpointReader(folder / "killed").step == step
    train(config)
    assert_same(folder, "killed", straight)


def grow(folder, source, target, stage):
    (folder / "stage.yaml").write_text(yaml.safe_dump(stage))
    arguments = ["--load", folder / source, "--save", folder / target, "--stage", folder / "stage.yaml", "--verify"]
    done = run("tools/reshard_checkpoint.py", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [0, 1], ids=["first stage", "last stage"])
def test_stop_grow_with_the_tool_and_restart_is_the_same(folder, straight, number):
    name, step, growth = f"tool-{number}", GROWN[number], stages(*schedules("cosine")[1:])
    grow(folder, f"{straight}/step_{step:08d}", f"{name}-grown", growth[number])
    train(configured(folder, name, checkpoint={"load": str(folder / f"{name}-grown")}))
    assert_same(folder, name, straight, steps=range(step + 1, STEPS + 1))


def test_a_restart_whose_own_schedule_is_that_of_the_stage_counts_from_the_growth(folder, straight):
    """From the last stage without `growth`: the schedule ends with the run, as in the stage."""
    grow(folder, f"{straight}/step_00000010", "plain-grown", stages(*schedules("cosine")[1:])[1])
    model = to_dict(CheckpointReader(folder / "plain-grown").record.model)
    load = {"load": str(folder / "plain-grown")}
    of_last = {"lr_warmup_iters": 0, "lr_decay_iters": None, **schedules("cosine")[2]}
    train(configured(folder, "plain", growth=[], model=model, optimizer=of_last, checkpoint=load))
    assert_same(folder, "plain", straight, steps=range(11, STEPS + 1))


def test_a_fine_tuned_model_starts_its_schedule_over(folder, straight):
    model = to_dict(CheckpointReader(folder / straight).record.model)
    checkpoint = {"load": str(folder / straight), "finetune": True}
    train(
        configured(folder, "tuned", "linear", growth=[], model=model, checkpoint=checkpoint), "--training.train_iters=4"
    )
    assert rates_of(folder, "tuned") == pytest.approx(RATES["linear"][:4], rel=1e-12)
    assert CheckpointReader(folder / "tuned").record.schedule_start is None


def test_a_stage_that_gets_a_schedule_after_its_growth_is_refused(folder):
    first = stages(None, None)[0]
    train(configured(folder, "late", growth=[first]), "--training.train_iters=6")
    done = run("megatron_tf.pretrain", configured(folder, "late", growth=[first | {"optimizer": {"lr": 1e-3}}]))
    assert done.returncode == 1
    assert "was grown without growth[0].optimizer, so its record has no start for this schedule" in done.stderr


def test_a_changed_schedule_of_the_stage_in_force_is_listed(folder, straight):
    _, of_first, of_second = schedules("cosine")
    growth = stages(of_first | {"min_lr": 1e-5}, of_second | {"lr": 5e-4})
    load = {"load": str(folder / straight / "step_00000007")}
    out = train(configured(folder, "changed", growth=growth, checkpoint=load), "--training.train_iters=9")
    assert "optimizer.min_lr 0.0 -> 1e-05" in out
    assert "optimizer.lr " not in out  # that of the next stage is not in force
