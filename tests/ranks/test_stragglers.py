"""A rank that is slow is named while the run continues, with its host and phase; ranks that wait for it are not."""

import json
import socket
import statistics
import time
from collections import deque

import numpy as np
import pytest

from megatron_tf.data.gpt_dataset import GPTDataset
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.training.observability.metrics import MetricsLog
from megatron_tf.training.run.trainer import train
from megatron_tf.training.supervision.signals import SignalCatcher
from tests.support.data import write_data_set
from tests.support.layouts import layout_config

VOCAB = 257  # of NullTokenizer
STEPS = 4
SLOW = {
    "data": (GPTDataset, "__getitem__", 16),
    "computation": (TokenFormer, "forward", 16),
    "report": (MetricsLog, "step", 160),
}
"""Phase -> the function that sleeps, and for how many times as long as a forward pass: the machine may be slow too."""
FACTOR = 3.0
"""logging.straggler_factor: well below the slowdown of the victim, about 5, and above that of a rank that has to wait
for a core."""


class Pace:
    """Measures forward passes. Before the first one, a pass counts as 10 milliseconds."""

    def __init__(self):
        self.seconds = deque([0.01], maxlen=5)

    def slowed(self, function, passes):
        """The function, after a sleep of `passes` forward passes."""

        def slow(*args, **kwargs):
            time.sleep(passes * statistics.median(self.seconds))
            return function(*args, **kwargs)

        return slow

    def measured(self, forward):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = forward(*args, **kwargs)
            self.seconds.append(time.perf_counter() - start)
            return result

        return timed


def run_of(mesh, config, phase, victim):
    """Train, with a sleep in one phase of the victim; return the lines of the log."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "say", lambda log, text: said.append(text))
        if victim == mesh.world.rank():
            pace = Pace()
            patch.setattr(TokenFormer, "forward", pace.measured(TokenFormer.forward))
            where, name, passes = SLOW[phase]
            patch.setattr(where, name, pace.slowed(getattr(where, name), passes))
        train(config, mesh, signals=SignalCatcher(), data=[{}], end=lambda reason: None, resumable=None)
    return said


def config_of(layout, folder, **logging):
    ids = [[(7 * i + j) % VOCAB for j in range(40)] for i in range(40)]
    prefix = write_data_set(folder / "d", ids, np.int32)
    return layout_config(
        layout,
        model={"vocab_size": VOCAB},
        training={"train_iters": STEPS, "eval_interval": 0},
        data={"data_path": [str(prefix)], "split": "1,1,0", "data_cache_path": str(folder / "cache")},
        logging={
            "log_interval": STEPS // 2,
            "communication_interval": 1,
            "straggler_factor": FACTOR,
            "metrics_file": str(folder / "metrics.jsonl"),
            **logging,
        },
    )


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [line for line in lines if line.get("event") == "straggler"]
    return events, [line for line in lines if "slowdown" in line and "event" not in line]


@pytest.mark.parametrize(
    ("layout", "phase"),
    [((2, 1, 1), "data"), ((1, 1, 2), "data"), ((1, 1, 2), "computation"), ((2, 2, 1), "computation")],
    ids=str,
)
def test_a_slow_rank_is_named_with_its_phase(rank_pool, tmp_path, layout, phase):
    said, *_ = rank_pool.run(run_of, *layout, config_of(layout, tmp_path), phase, 1)
    events, intervals = metrics_of(tmp_path)
    assert events
    for event in events:
        assert (event["rank"], event["host"], event["phase"]) == (1, socket.gethostname(), phase)
        assert event["slowdown"] > FACTOR
        assert event["seconds"] > FACTOR * event["median_seconds"]
    assert [line["step"] for line in intervals] == [STEPS // 2, STEPS]
    # the first batch is read before the first step
    assert intervals[-1]["slowdown"] == events[-1]["slowdown"]
    host = socket.gethostname()
    assert any(f"warning: straggler: rank 1 (host {host}) works" in line and phase in line for line in said)


def test_the_first_rank_is_named_if_its_log_is_slow(rank_pool, tmp_path):
    rank_pool.run(run_of, 1, 1, 2, config_of((1, 1, 2), tmp_path), "report", 0)
    events, _ = metrics_of(tmp_path)
    assert {(event["rank"], event["phase"]) for event in events} == {(0, "report")}


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 1, 2)], ids=str)
def test_no_rank_of_an_even_run_is_named(rank_pool, tmp_path, layout):
    said, *_ = rank_pool.run(run_of, *layout, config_of(layout, tmp_path, straggler_factor=4.0), "data", None)
    events, intervals = metrics_of(tmp_path)
    assert not events
    assert all(1.0 <= line["slowdown"] <= 4.0 for line in intervals)
    assert not any("straggler" in line for line in said)


def test_nothing_is_compared_if_the_key_is_null_or_no_step_is_profiled(rank_pool, tmp_path):
    for options in ({"straggler_factor": None}, {"communication_interval": 0}):
        rank_pool.run(run_of, 1, 1, 2, config_of((1, 1, 2), tmp_path, **options), "data", 1)
    assert metrics_of(tmp_path) == ([], [])
