"""Metrics reach every sink, and no sink can end a run."""

import json
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import create_autospec

import pytest

from megatron_tf.config import ConfigError, LoggingConfig
from megatron_tf.training.metrics import MetricsLog
from megatron_tf.training.sinks import Guarded, JsonLines, open_sinks


def log_of(**options):
    return MetricsLog(LoggingConfig(**options), 0, 10, True)


def test_a_full_disk_is_warned_of_once_and_lines_lost_are_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    warnings = []
    guarded = Guarded(sink, warnings.append)
    guarded.scalars({"loss": 1.0}, 1)
    sound, sink.file = sink.file, open("/dev/full", "ab", buffering=0)  # noqa: PTH123, SIM115
    for step in (2, 3, 4):
        guarded.scalars({"loss": 1.0}, step)
    sink.file = sound
    guarded.scalars({"loss": 1.0}, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 5]
    assert len(warnings) == 2
    assert "No space left on device; training goes on without it" in warnings[0]
    assert "takes metrics again, 3 were lost" in warnings[1]


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
        assert "warning: the log takes no more lines: " in capsys.readouterr().err


def test_tensorboard_gets_every_scalar(tmp_path):
    with log_of(tensorboard_dir=tmp_path) as log:
        log.step(1, 128, {"loss": 2.5, "grad_norm/qkv": 0.5})
        log.validation(1, {"": 3.0, "books": 3.5})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = {"loss": 2.5, "grad_norm/qkv": 0.5, "validation_loss": 3.0, "validation_loss/books": 3.5}
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == tags


def wandb_init(project, name, id, resume, dir):
    """The part of wandb.init's signature that is used."""


def test_weights_and_biases_gets_configuration_and_scalars(monkeypatch):
    run = SimpleNamespace(log=create_autospec(lambda data, step: None), config={}, finish=create_autospec(lambda: None))
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


def test_weights_and_biases_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        open_sinks(LoggingConfig(wandb_project="growth"), print)
