"""The loop around non-finite batches: they are skipped and counted, and too many consecutive ones abort the run."""

import json
import math

import pytest
import torch

from megatron_tf import pretrain
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import plot_run
from megatron_tf.training.run import loop
from megatron_tf.training.step.step import StepResult
from tests.support.commands import make_run
from tests.support.runs import derive_run

pytestmark = pytest.mark.slow  # whole runs, with a process that prepares their data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("faults"), training={"train_iters": 6})


def run_with_faults(folder, monkeypatch, name, faults, is_overflow=False):
    """(exit code, position of each batch) of a run whose batches of these numbers are non-finite, or overflow."""
    config = derive_run(folder, name)
    original, seen, positions = loop.train_step, iter(range(1000)), []

    def step(state, batch, lr, inspector):
        positions.append(int(batch.sample_numbers[0, 0]))
        if next(seen) in faults:
            nonfinite = {"layers.1.ffn.key_tokens": 0, "head.weight": 3}
            return StepResult(math.nan, math.nan, nonfinite=nonfinite, is_overflow=is_overflow)
        return original(state, batch, lr, inspector)

    monkeypatch.setattr(loop, "train_step", step)
    return pretrain.main([str(config)]), positions


def test_some_are_skipped_and_said(folder, monkeypatch, capsys):
    assert run_with_faults(folder, monkeypatch, "some", {1, 2, 4}) == (0, list(range(0, 72, 8)))
    out = capsys.readouterr().out
    assert (
        "non-finite: layers.1.ffn.key_tokens (rank 0), head.weight (rank 3); the batch that ends at sample 16 is "
        "skipped, 1 so far" in out
    )
    training = CheckpointReader(folder / "some").record.training
    assert (training.step, training.skipped, training.samples, training.tokens) == (6, 3, 72, 6 * 8 * 16)
    lines = [json.loads(line) for line in (folder / "some.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines if line.get("event") == "skipped"] == [16, 24, 40]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 6
    assert [len(stage.steps) for stage in plot_run.read_stages(folder / "some.jsonl")] == [6]


def test_too_many_in_a_row_end_the_run_with_what_was_before(folder, monkeypatch, capsys):
    assert run_with_faults(folder, monkeypatch, "many", set(range(3, 8)))[0] == 1
    error = capsys.readouterr().err
    assert "5 consecutive batches were non-finite in layers.1.ffn.key_tokens (rank 0), head.weight (rank 3)" in error
    assert "after step 3" in error
    assert run_with_faults(folder, monkeypatch, "straight", set())[0] == 0
    reader = CheckpointReader(folder / "many")
    assert reader.step == 3
    monkeypatch.undo()
    assert pretrain.main([str(folder / "many.yaml")]) == 0
    assert CheckpointReader(folder / "many").record.training.samples == 8 * (6 + 5)
    rows = reader.read_rows("model", "embedding.weight", start=0, stop=257)
    assert torch.isfinite(rows).all()


def test_overflows_are_no_faults_of_the_data(folder, monkeypatch, capsys):
    assert run_with_faults(folder, monkeypatch, "overflows", set(range(1, 9)), is_overflow=True)[0] == 0
    assert "the batch that ends at sample 16 is skipped" in capsys.readouterr().out
    training = CheckpointReader(folder / "overflows").record.training
    assert (training.step, training.skipped, training.overflows, training.samples) == (6, 0, 8, 8 * (6 + 8))
    lines = [json.loads(line) for line in (folder / "overflows.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 6
    assert [list(stage.steps) for stage in plot_run.read_stages(folder / "overflows.jsonl")] == [[1, 2, 3, 4, 5, 6]]
