"""Metrics reach every sink, and no sink can end a run."""

import json
import os
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import create_autospec

import pytest

from megatron_tf.config import ConfigError, LoggingConfig
from megatron_tf.errors import UserError
from megatron_tf.training.observability.metrics import MetricsLog
from megatron_tf.training.observability.sinks import BestEffortSink, JsonLines, open_sinks


def log_of(**options):
    return MetricsLog(LoggingConfig(**options), first_step=0, train_iters=10, enabled=True)


def test_a_full_disk_is_warned_of_once_and_lines_lost_are_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    warnings = []
    guarded = BestEffortSink(sink, warnings.append)
    guarded.scalars({"loss": 1.0}, 1)
    sound, sink.file = sink.file, open("/dev/full", "ab", buffering=0)  # noqa: PTH123, SIM115
    for step in (2, 3, 4):
        guarded.scalars({"loss": 1.0}, step)
    sink.file = sound
    guarded.scalars({"loss": 1.0}, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 5]
    assert len(warnings) == 2
    assert "No space left on device; training continues without it" in warnings[0]
    assert "accepts metrics again, 3 were lost" in warnings[1]


def test_half_a_line_does_not_stay(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.event({"a": 1})
    whole = sink.file
    sink.file = SimpleNamespace(tell=whole.tell, truncate=whole.truncate, write=lambda line: whole.write(line[:5]))
    with pytest.raises(OSError, match="full"):
        sink.event({"b": 2})
    sink.file = whole
    whole.seek(0, 2)
    sink.event({"c": 3})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [{"a": 1}, {"c": 3}]


def test_a_log_on_a_full_disk_does_not_end_the_run(monkeypatch, capsys):
    with open("/dev/full", "w") as full, log_of() as log:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        log.say("something")
        monkeypatch.undo()
        full.close = lambda: None
        assert "warning: the log can't be written: " in capsys.readouterr().err


def test_tensorboard_gets_every_scalar(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with log_of(tensorboard_dir=tmp_path) as log:
        log.step(1, 128, {"loss": 2.5, "grad_norm/qkv": 0.5})
        log.validation(1, {"": 3.0, "books": 3.5})
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = {"loss": 2.5, "grad_norm/qkv": 0.5, "validation_loss": 3.0, "validation_loss/books": 3.5}
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == tags


def wandb_init(project, name, id, resume, dir):
    """The part of wandb.init's signature that is used."""


def test_weights_and_biases_gets_configuration_and_scalars(monkeypatch):
    run = SimpleNamespace(log=create_autospec(lambda data, step: None), step=0, finish=create_autospec(lambda: None))
    run.config = SimpleNamespace(update=create_autospec(lambda values, allow_val_change: None))
    module = ModuleType("wandb")
    module.init = create_autospec(wandb_init, return_value=run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with log_of(wandb_project="growth", wandb_exp_name="base") as log:
        log.event({"event": "start", "step": 0, "parameters": 7, "config": {"model": {}}})
        log.step(1, 128, {"loss": 2.5})
    module.init.assert_called_once_with(project="growth", name="base", id="base", resume="allow", dir=None)
    run.config.update.assert_called_once_with({"model": {}}, allow_val_change=True)
    assert [call.args[0] for call in run.log.call_args_list] == [{"parameters": 7}, {"loss": 2.5}]
    run.finish.assert_called_once_with()


class Service:
    """Stands for the module: runs by id, each with its history, which takes steps in order only, as wandb 0.28 does."""

    def __init__(self):
        self.histories = {}

    def init(self, project, name, id, resume, dir):
        assert resume == "allow"
        history = self.histories.setdefault(id or f"drawn {len(self.histories)}", [])
        run = SimpleNamespace(step=history[-1][0] + 1 if history else 0, finish=lambda: None)

        def log(values, step):
            assert step >= run.step, "the service would drop it, and write a warning for each"
            run.step = step
            if history and history[-1][0] == step:
                history[-1][1].update(values)
            else:
                history.append((step, values))

        run.log = log
        run.config = SimpleNamespace(update=lambda values, allow_val_change: None)
        return run


@pytest.mark.parametrize("how", ["a kill", "a rewind"])
def test_weights_and_biases_has_each_step_once_after(monkeypatch, capsys, how):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    options = {"wandb_project": "growth", "wandb_exp_name": "base"}
    start = {"event": "start", "parameters": 7, "lineage": 0}
    with log_of(**options) as log:
        log.event(start | {"step": 0})
        for step in (1, 2, 3, 4):
            log.step(step, 128, {"loss": float(step)})
        if how == "a rewind":
            log.event({"event": "rewind", "step": 2, "samples": 5})
            for step in (3, 4, 5):
                log.step(step, 128, {"loss": 10.0 * step})
    if how == "a kill":
        with MetricsLog(LoggingConfig(**options), first_step=2, train_iters=10, enabled=True) as log:
            log.event(start | {"step": 2})
            for step in (3, 4, 5):
                log.step(step, 128, {"loss": 10.0 * step})
    assert list(service.histories) == ["base"]
    losses = [(step, values["loss"]) for step, values in service.histories["base"] if "loss" in values]
    latest = 40.0 if how == "a rewind" else 4.0  # of the step that is being written the service takes what comes last
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, latest), (5, 50.0)]
    told = "earlier steps that are repeated keep their first values there"
    assert capsys.readouterr().err.count(told) == 1


def test_a_restart_without_a_name_says_that_it_is_another_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Service())
    for first_step, count in ((0, 0), (3, 1)):
        with MetricsLog(LoggingConfig(wandb_project="growth"), first_step=first_step, train_iters=10, enabled=True):
            pass
        assert capsys.readouterr().err.count("without logging.wandb_exp_name this restart is another run") == count


def test_weights_and_biases_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install '.\[wandb\]'"):
        open_sinks(LoggingConfig(wandb_project="growth"), print)


def test_weights_and_biases_that_refuses_is_one_line(monkeypatch):
    module = ModuleType("wandb")

    def refuse(**options):
        raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login()")

    module.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", module)
    message = r"^logging.wandb_project: api_key not configured \(no-tty\). Call wandb.login\(\)$"
    with pytest.raises(ConfigError, match=message):
        open_sinks(LoggingConfig(wandb_project="growth"), print)


def test_a_log_that_closes_is_warned_of_once(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with log_of() as log:
        monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
        for _ in range(5):
            log.say("something")
    monkeypatch.undo()
    assert capsys.readouterr().err.count("the log can't be written") == 1


def test_shares_of_an_interval_are_of_all_its_time(capsys):
    values = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0}
    with log_of() as log:
        log.interval(1, values, phases={"start": 3.0, "data": 1.0}, notes="")
    assert "(start 75%, data 25%)" in capsys.readouterr().out


def test_the_rate_of_the_first_interval_leaves_the_start_out(capsys):
    values = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0}
    with log_of() as log:
        log.step(1, 128, values)
        log.interval(1, values, phases={"start": 60.0, "data": 1.0, "optimizer": 1.0}, notes="")
    assert " 64 tokens/s " in capsys.readouterr().out


@pytest.mark.parametrize("how", ["a kill", "a rewind"])
def test_tensorboard_shows_each_step_once_after(tmp_path, how):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with log_of(tensorboard_dir=tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.step(step, 128, {"loss": float(step)})
        if how == "a rewind":
            log.event({"event": "rewind", "step": 2, "samples": 5})
            for step in (3, 4, 5):
                log.step(step, 128, {"loss": 10.0 * step})
    if how == "a kill":
        with MetricsLog(LoggingConfig(tensorboard_dir=tmp_path), first_step=2, train_iters=10, enabled=True) as log:
            for step in (3, 4, 5):
                log.step(step, 128, {"loss": 10.0 * step})
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
