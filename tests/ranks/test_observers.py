"""Observers follow a run on every rank, and each can stop all of them."""

import dataclasses

import numpy as np
import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.config.growth import GrowthStage
from megatron_tf.training.observability.observer import Observer
from megatron_tf.training.run.trainer import train
from megatron_tf.training.supervision.signals import SignalCatcher
from tests.support.data import write_data_set
from tests.support.layouts import layout_config

VOCAB = 257  # of NullTokenizer
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]


class Recorder(Observer):
    """Notes what it is told, without times; gives a reason to stop after one step or evaluation."""

    def __init__(self, stops_at=None):
        self.stops_at = stops_at
        self.seen = []
        self.saved = []

    def on_step(self, report):
        report = dataclasses.replace(report, seconds=0.0, usage=dataclasses.replace(report.usage, device_seconds=0.0))
        return self.note("step", report.step, report)

    def on_evaluation(self, evaluation):
        return self.note("evaluation", evaluation.step, evaluation)

    def on_growth(self, stage):
        self.note("growth", stage.record.training.step, (stage.config.model, dict(stage.layout)))

    def on_checkpoint(self, path):
        self.saved.append(path.name)

    def note(self, kind, step, what):
        self.seen.append((kind, step, what))
        return "it is enough" if (kind, step) == self.stops_at else None


def observed_run(mesh, config, stops_at=None, stopping_rank=0):
    """(exit code, what an observer was told, checkpoints it was told of) on one rank."""
    rank = 0 if mesh.world is None else mesh.world.rank()
    recorder = Recorder(stops_at if rank == stopping_rank else None)
    code = train(
        config,
        mesh,
        signals=SignalCatcher(),
        data=[{}],
        end=lambda reason: None,
        resumable=None,
        observers=[Recorder(), recorder],
    )
    return code, recorder.seen, recorder.saved


def config_of(layout, folder):
    """A run of four steps, with an evaluation after every second one and a growth between the third and fourth."""
    ids = [[(7 * i + j) % VOCAB for j in range(40)] for i in range(40)]
    prefix = write_data_set(folder / "d", ids, np.int32)
    config = layout_config(
        layout,
        model={"vocab_size": VOCAB},
        training={"train_iters": 4, "eval_interval": 2, "eval_iters": 1},
        data={"data_path": [str(prefix)], "split": "1,1,0", "data_cache_path": str(folder / "cache")},
        checkpoint={"save": str(folder / "saved")},
    )
    return dataclasses.replace(config, growth=[GrowthStage(at_step=3, ffn_tokens=96)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_is_told_the_same(rank_pool, tmp_path, layout):
    answers = rank_pool.run(observed_run, *layout, config_of(layout, tmp_path))
    assert all(repr(answer) == repr(answers[0]) for answer in answers)
    code, seen, saved = answers[0]
    assert code == 0
    steps = [("step", 1), ("step", 2), ("evaluation", 2), ("step", 3), ("growth", 3), ("step", 4), ("evaluation", 4)]
    assert [(kind, step) for kind, step, _ in seen] == steps
    assert saved == ["step_00000003", "step_00000004"]
    first = seen[0][2]
    assert first.grad_norm == pytest.approx(sum(norm**2 for norm in first.norms.values()) ** 0.5)
    assert first.tokens == 8 * 16
    assert seen[4][2][0].ffn_tokens == 96


@pytest.mark.parametrize("stops_at", [("step", 1), ("evaluation", 2), ("step", 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_a_reason_on_one_rank_stops_all_with_all_saved(rank_pool, tmp_path, layout, stops_at):
    answers = rank_pool.run(observed_run, *layout, config_of(layout, tmp_path), stops_at, 1)
    for code, seen, saved in answers:
        assert code == 0
        assert seen[-1][:2] == stops_at
        assert saved == [f"step_{stops_at[1]:08d}"]
    reader = CheckpointReader(tmp_path / "saved")
    reader.verify()
    assert reader.step == stops_at[1]
    assert reader.record.details.evaluation_due == (stops_at == ("step", 2))  # left out, made up for at the next start


def test_a_reason_from_an_evaluation_that_was_left_out_stops_at_once(rank_pool, tmp_path):
    layout = (1, 1, 2)
    config = config_of(layout, tmp_path)
    rank_pool.run(observed_run, *layout, config, ("step", 2))
    answers = rank_pool.run(observed_run, *layout, config, ("evaluation", 2), 1)
    assert [(code, [told[:2] for told in seen]) for code, seen, _ in answers] == [(0, [("evaluation", 2)])] * 2
    record = CheckpointReader(tmp_path / "saved").record
    assert (record.training.step, record.details.evaluation_due) == (2, False)
