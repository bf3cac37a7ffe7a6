"""The schedule of a growth stage replaces that of the run, and its end is known or refused."""

import dataclasses

import pytest

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.schedule_start import ScheduleStart
from megatron_tf.config import ConfigError, GrowthStage, RunConfig, ScheduleConfig, parse_config, to_dict
from megatron_tf.training.run.schedule_start import restored_start
from tests.support.records import make_record
from tests.support.training import small_run

RUN = {"lr": 8e-4, "min_lr": 2e-4, "lr_warmup_iters": 2, "weight_decay": 0.3, "adam_beta2": 0.9}
FIRST = {"lr": 6e-4, "lr_warmup_iters": 2}
SECOND = {"lr": 4e-4, "min_lr": 1e-4, "lr_decay_style": "linear"}


def run_with(*stages, train_iters=20):
    """Configure a run that grows after 4, 10 and 16 steps; a stage is its schedule, or keys of the stage."""
    growth = []
    for number, stage in enumerate(stages):
        keys = stage if stage is None or "optimizer" in stage or "at_tokens" in stage else {"optimizer": stage}
        place = {} if "at_tokens" in (keys or {}) else {"at_step": 4 + 6 * number}
        growth.append({"ffn_tokens": 96 + 32 * number, **place, **(keys or {})})
    values = to_dict(small_run(checkpoint={"save": "run"}, optimizer=RUN, training={"train_iters": train_iters}))
    return parse_config(RunConfig, values | {"growth": growth}, "test")


def schedule_of(config, number):
    """The keys of the schedule after `number` stages that are not defaults."""
    optimizer = config.at_stage(number).optimizer
    keys = {key.name: (getattr(optimizer, key.name), key.default) for key in dataclasses.fields(ScheduleConfig)}
    return {name: value for name, (value, default) in keys.items() if value != getattr(default, "default", default)}


def test_a_schedule_is_in_force_until_the_next_one_and_inherits_nothing_from_the_run():
    config = run_with(FIRST, None, SECOND)
    of_run = {key: RUN[key] for key in ("lr", "min_lr", "lr_warmup_iters")}
    # it ends where the next one starts, over the stage between them that has none
    first = FIRST | {"lr_decay_iters": 12}
    assert [schedule_of(config, number) for number in range(4)] == [of_run, first, first, SECOND]


def test_the_other_keys_of_the_optimizer_stay():
    config = run_with(FIRST, SECOND)
    for number in range(3):
        optimizer = config.at_stage(number).optimizer
        assert (optimizer.weight_decay, optimizer.adam_beta2, optimizer.clip_grad) == (0.3, 0.9, 0.5)


def test_without_a_schedule_that_of_the_run_continues():
    config = run_with(None, None)
    assert [config.at_stage(number).optimizer for number in range(3)] == [config.optimizer] * 3


@pytest.mark.parametrize("ending", [{"lr_decay_iters": 90}, {"lr_decay_tokens": 90}, {"lr_decay_style": "constant"}])
def test_a_schedule_that_knows_its_end_gets_no_other(ending):
    schedule = {"lr": 6e-4, **ending}
    assert schedule_of(run_with(schedule, SECOND), 1) == schedule


@pytest.mark.parametrize("ending", [{"lr_decay_iters": 90}, {"lr_decay_tokens": 90}, {"lr_decay_style": "constant"}])
def test_a_schedule_that_knows_its_end_may_start_after_some_tokens(ending):
    stage = {"at_tokens": 999, "optimizer": {"lr": 6e-4, **ending}}
    assert schedule_of(run_with(stage), 1) == stage["optimizer"]


UNKNOWN = "its length in steps is unknown because growth[{}] is at_tokens: give lr_decay_iters or lr_decay_tokens"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"at_tokens": 999, "optimizer": FIRST}], f"growth[0].optimizer: {UNKNOWN.format(0)}"),
        ([FIRST, None, {"at_tokens": 999, "optimizer": FIRST}], f"growth[0].optimizer: {UNKNOWN.format(2)}"),
        (
            [{"at_tokens": 999, "optimizer": {"lr": 1.0, "lr_decay_style": "constant", "lr_warmup_fraction": 0.1}}],
            f"growth[0].optimizer: {UNKNOWN.format(0)}",
        ),
        (
            [None, FIRST | {"lr_warmup_iters": 11}],
            "growth[1].optimizer: lr_warmup_iters (11) is longer than the whole schedule, which ends at "
            "training.train_iters - growth[1].at_step (10)",
        ),
        (
            [{"lr": 1.0, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 7}, SECOND],
            "growth[0].optimizer: lr_wsd_decay_iters (7) is longer than the whole schedule, which ends at "
            "growth[1].at_step - growth[0].at_step (6)",
        ),
        (
            [FIRST | {"lr_decay_tokens": 8}],
            "growth.0.optimizer: a schedule in tokens needs lr_decay_tokens and no key in steps, got",
        ),
        (
            [FIRST | {"lr_decay_iters": 1}],
            "growth.0.optimizer: lr_warmup_iters (2) is longer than the whole schedule, which ends at lr_decay_iters "
            "(1)",
        ),
        ([{"min_lr": 0.1}], "missing key 'growth.0.optimizer.lr'"),
        ([FIRST | {"weight_decay": 0.1}], "unknown key 'growth.0.optimizer.weight_decay'; known keys: lr, min_lr"),
        ([FIRST | {"lr_warm_up": 1}], "unknown key 'growth.0.optimizer.lr_warm_up'; did you mean 'lr_warmup_iters'?"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line_with_its_stage(stages, message):
    with pytest.raises(ConfigError) as caught:
        run_with(*stages)
    assert str(caught.value).startswith(f"test: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("warm_up", ["lr_warmup_iters=3", "lr_warmup_fraction=0.5", "lr_warmup_tokens=3"])
def test_a_stage_does_not_warm_up_twice(warm_up):
    key, _, value = warm_up.partition("=")
    schedule = {"lr": 6e-4, "lr_decay_tokens": 99, key: float(value) if "." in value else int(value)}
    schedule |= {"lr_decay_iters": schedule.pop("lr_decay_tokens")} if key == "lr_warmup_iters" else {}
    with pytest.raises(ConfigError, match=r"^test: warm-up is given twice, as rewarmup_iters and in optimizer"):
        parse_config(GrowthStage, {"ffn_tokens": 96, "rewarmup_iters": 5, "optimizer": schedule}, "test")
    for alone in ({"rewarmup_iters": 5, "optimizer": {"lr": 6e-4}}, {"optimizer": schedule}):
        parse_config(GrowthStage, {"ffn_tokens": 96, **alone}, "test")


def test_a_last_stage_that_a_shorter_run_does_not_reach_is_no_mistake():
    assert schedule_of(run_with(FIRST, FIRST, train_iters=8), 2) == FIRST


def record_at(step, start=None):
    return dataclasses.replace(make_record(small_run().model, step=step), schedule_start=start)


def test_a_run_counts_from_the_recorded_start():
    config, start = run_with(FIRST, SECOND), ScheduleStart(4, 512)
    assert restored_start(config, record_at(7, start), stage=1, source="checkpoint") == start
    assert restored_start(config, record_at(3), stage=0, source="checkpoint") is None


def test_a_new_run_that_starts_in_a_stage_with_a_schedule_counts_from_its_first_step():
    assert restored_start(run_with(FIRST), record_at(0), stage=1, source="checkpoint") == ScheduleStart(0, 0)


def test_a_schedule_that_a_completed_stage_gets_later_is_refused():
    with pytest.raises(CheckpointError, match=r"^checkpoint was grown without growth\[0\].optimizer, [^\n]*$"):
        restored_start(run_with(FIRST), record_at(6), stage=1, source="checkpoint")


def test_the_rest_of_the_run_is_long_enough_for_a_schedule_that_ends_with_it():
    config = small_run(optimizer={"lr_warmup_iters": 5}, training={"train_iters": 20})
    assert restored_start(config, record_at(15, ScheduleStart(15, 0)), stage=0, source="checkpoint")
    with pytest.raises(ConfigError) as caught:
        restored_start(config, record_at(16, ScheduleStart(16, 0)), stage=0, source="checkpoint")
    assert str(caught.value) == (
        "optimizer: lr_warmup_iters (5) is longer than the whole schedule, which ends at training.train_iters - "
        "schedule_start.step (4)"
    )
    assert restored_start(config, record_at(20, ScheduleStart(19, 0)), stage=0, source="checkpoint")  # complete
    beyond = small_run(optimizer={"lr_warmup_iters": 5, "lr_decay_iters": 99}, training={"train_iters": 20})
    assert restored_start(beyond, record_at(16, ScheduleStart(16, 0)), stage=0, source="checkpoint")
