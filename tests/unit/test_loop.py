"""What a run reports and counts, and how it goes back after spikes."""

import json
import os
import signal
from dataclasses import replace

import pytest
import yaml

from megatron_tf import pretrain
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.config import load_config
from megatron_tf.tokenformer.sizes import training_flops
from megatron_tf.training.run import loop
from tests.support.commands import make_run
from tests.support.runs import derive_run

pytestmark = pytest.mark.slow  # whole runs, with a process that prepares their data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("loop"), training={"train_iters": 6})


def train(folder, name, *options, growth=()):
    """(exit code, lines of metrics) of a run, or of its next part."""
    config = derive_run(folder, name, growth=growth, logging={"log_interval": 2})
    code = pretrain.main([str(config), *options])
    return code, [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_totals_go_on_over_restarts_and_growth(folder):
    growth = [{"at_step": 4, "ffn_tokens": 128}]
    train(folder, "totals", "--training.train_iters=2", growth=growth)
    code, lines = train(folder, "totals", "--checkpoint.allow_changes=[training.train_iters]", growth=growth)
    assert code == 0
    run = load_config(folder / "totals.yaml", [])
    small, large = (training_flops(run.at_stage(stage).model, 16) for stage in (0, 1))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["flops"] for line in steps] == [128 * (min(i, 4) * small + max(i - 4, 0) * large) for i in range(1, 7)]
    hours = [line["device_hours"] for line in steps]
    assert hours == sorted(set(hours))
    usage = CheckpointReader(folder / "totals").record.usage
    assert usage.flops == steps[-1]["flops"]
    assert usage.device_seconds >= 3600 * hours[-1] > 0


def test_each_step_says_what_it_took(folder):
    code, lines = train(folder, "metrics", "--logging.peak_teraflops=0.001")
    assert code == 0
    step = next(line for line in lines if line.get("step") == 4 and "loss" in line)
    norms = [step[f"grad_norm/{kind}"] for kind in ("embedding", "qkv", "proj", "ffn", "final_norm")]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(step["grad_norm"], rel=1e-6)
    assert step["mfu"] == pytest.approx(step["teraflops_per_device"] / 0.001)
    assert step["memory_bytes"] > 1e7
    assert all(step[f"seconds/{phase}"] > 0 for phase in ("data", "forward-backward", "optimizer"))


def test_each_validation_set_has_its_loss(folder):
    prefix = yaml.safe_load((folder / "run.yaml").read_text())["data"]["data_path"][0]
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"other{suffix}").write_bytes((folder / (prefix + suffix)).read_bytes())
    sets = f"--data.valid_data_path=['3 {prefix}', '1 {folder / 'other'}']"
    options = ["--training.eval_interval=6", "--training.eval_iters=2"]
    code, lines = train(folder, "sets", sets, *options)
    assert code == 0
    (found,) = [line for line in lines if "validation_loss" in line]
    first, second = found["validation_loss/data_text_document"], found["validation_loss/other"]
    assert first != second  # the order of samples depends on the name
    assert found["validation_loss"] == pytest.approx(0.75 * first + 0.25 * second)
    _, lines = train(folder, "alone", f"--data.valid_data_path=[{folder / 'other'}]", *options)
    assert [line["validation_loss"] for line in lines if "validation_loss" in line] == [second]


def with_spikes(monkeypatch, spikes):
    """Steps whose loss jumps where the batch, counted from the start, is one of `spikes`."""
    original, seen = loop.train_step, iter(range(10_000))

    def step(*arguments, **options):
        result = original(*arguments, **options)
        return replace(result, loss=50.0 if next(seen) in spikes else 5.0)

    monkeypatch.setattr(loop, "train_step", step)


LONG = ["--training.train_iters=50", "--checkpoint.save_interval=20"]


def test_a_spike_is_reported(folder, monkeypatch, capsys):
    with_spikes(monkeypatch, {40, 41})
    code, lines = train(folder, "spike", *LONG)
    assert code == 0
    assert [line["step"] for line in lines if line.get("event") == "spike"] == [41, 42]
    out = capsys.readouterr().out
    assert "the loss jumped to 50.0000, 2 consecutive step(s); the batch ends at sample 336" in out


def test_after_spikes_it_goes_back_and_skips_the_data(folder, monkeypatch, capsys):
    with_spikes(monkeypatch, {44, 45})
    code, lines = train(folder, "rewound", *LONG, "--training.rewind_after_spikes=2")
    assert code == 0
    assert "rewound to" in capsys.readouterr().out
    steps = [line["step"] for line in lines if "loss" in line and "event" not in line]
    assert steps == [*range(1, 47), *range(41, 51)]
    training = CheckpointReader(folder / "rewound").record.training
    assert (training.step, training.adam_steps, training.skipped) == (50, 50, 6)
    assert training.samples == 8 * 56
    assert training.tokens == 8 * 16 * 50


def test_spikes_again_and_again_end_the_run(folder, monkeypatch, capsys):
    with_spikes(monkeypatch, set(range(44, 100)))
    code, _ = train(folder, "hopeless", *LONG, "--training.rewind_after_spikes=2")
    assert code == 1
    assert "the loss jumped again after 3 rewinds" in capsys.readouterr().err


def test_spikes_before_the_first_checkpoint_are_reported_only(folder, monkeypatch, capsys):
    with_spikes(monkeypatch, {34, 35})
    code, lines = train(folder, "early", "--training.train_iters=40", "--training.rewind_after_spikes=2")
    assert code == 0
    assert "there is no checkpoint to rewind to: training continues" in capsys.readouterr().out
    assert [line["step"] for line in lines if "loss" in line and "event" not in line] == list(range(1, 41))


def test_an_evaluation_that_a_stop_left_due_is_dropped_by_a_run_without_any(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluation_loss", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 0.0)
        code, _ = train(folder, "dropped", "--training.eval_interval=2", "--training.eval_iters=9")
    assert code == 75
    record = CheckpointReader(folder / "dropped").record
    assert (record.training.step, record.details.evaluation_due) == (2, True)
    code, lines = train(folder, "dropped", "--training.eval_interval=0")
    assert code == 0
    assert not any("validation_loss" in line for line in lines)
    assert not CheckpointReader(folder / "dropped").record.details.evaluation_due


def test_each_start_makes_progress_however_short_its_time(folder):
    limits = ["--training.train_iters=3", "--training.eval_interval=1", "--training.exit_duration_in_mins=1e-6"]
    steps = []
    for _ in range(4):
        code, lines = train(folder, "short", *limits)
        steps.append((code, CheckpointReader(folder / "short").step))
    assert steps == [(75, 1), (75, 2), (75, 3), (0, 3)]
    assert [line["step"] for line in lines if "validation_loss" in line] == [1, 2, 3]


def test_a_growth_that_never_comes_due_is_warned_of(folder, capsys):
    code, _ = train(folder, "never", growth=[{"at_step": 4, "ffn_tokens": 128}, {"at_step": 6, "ffn_tokens": 160}])
    assert code == 0
    out = capsys.readouterr().out
    assert (
        "warning: growth[1] never comes due: it is at step 6, and training ends at step 6 (training.train_iters)" in out
    )
    assert "growth[0]" not in out
