"""Looking into steps: the time ranks communicate, traces of the steps requested in the configuration or by a signal."""

import gzip
import json
import os
import signal
import time

import pytest

from megatron_tf.training.observability.profiling import length_of_union
from tests.support.commands import make_run, run
from tests.support.runs import derive_run, ranks_of, start_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that takes some seconds."""
    return make_run(tmp_path_factory.mktemp("profiling"), training={"train_iters": 400, "micro_batch_size": 4})


def events_of(trace):
    return {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}


def test_overlapping_intervals_count_once():
    assert length_of_union([(5, 9), (0, 4), (2, 6), (20, 21), (8, 9)]) == 10
    assert length_of_union([]) == 0


@pytest.mark.parametrize("layout", ["tensor", "data"])
def test_ranks_say_how_long_they_communicate(folder, layout):
    metrics, traces = folder / f"{layout}.jsonl", folder / f"traces-{layout}"
    options = [f"--logging.metrics_file={metrics}", "--logging.communication_interval=2", "--training.train_iters=4"]
    options += [f"--logging.profile_dir={traces}", "--logging.profile_step_start=3", "--logging.profile_step_end=3"]
    size = "--parallel.tensor_model_parallel_size=2" if layout == "tensor" else "--parallel.data_parallel_size=2"
    done = run("megatron_tf.pretrain", folder / "run.yaml", *options, size, ranks=2)
    assert done.returncode == 0, done.stderr
    steps = [line for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert [line["step"] for line in steps if "seconds/communication" in line] == [2, 3, 4]
    assert all(0 < line["seconds/communication"] < 60 for line in steps[1:])
    places = ["pp00-tp00-dp00", "pp00-tp01-dp00" if layout == "tensor" else "pp00-tp00-dp01"]
    assert sorted(path.name for path in traces.iterdir()) == [f"step-00000003-{place}.json.gz" for place in places]
    assert any(name.startswith("gloo:") for name in events_of(traces / f"step-00000003-{places[1]}.json.gz"))


def test_a_signal_to_one_rank_traces_the_next_step_on_all(folder):
    process = start_run(derive_run(folder, "traced", logging={"profile_dir": str(folder / "asked")}), ranks=2)
    os.kill(ranks_of(process.pid)[1], signal.SIGUSR2)
    limit = time.monotonic() + 60
    while len(list((folder / "asked").glob("*.json.gz"))) < 2:
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=90)
    assert "traced: " in out
    assert len({path.name.split("-")[1] for path in (folder / "asked").iterdir()}) == 1
