"""Runs under `data.order: lanes` read every token of an epoch once, whatever changes between and within jobs."""

import itertools
import json
import shutil

import pytest
import yaml

from megatron_tf import pretrain
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.config.load import to_dict
from megatron_tf.data.loader import BatchLoader
from megatron_tf.training.run.spikes import SpikeDetector
from tests.support.commands import run
from tests.support.damage import FILE
from tests.support.data import write_data_set
from tests.support.training import small_run

HALF = 128  # tokens of each set; its ids are unique
FIRST = {"train_iters": 2, "seq_length": 8, "global_batch_size": 4, "micro_batch_size": 2}
SECOND = {"train_iters": 5, "seq_length": 16, "global_batch_size": 2, "micro_batch_size": 1}
THIRD = {"train_iters": 6, "seq_length": 4, "global_batch_size": 8, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets of unique ids."""
    folder = tmp_path_factory.mktemp("lanes")
    for name, first in (("a", 0), ("b", HALF)):
        bounds = [*range(first, first + HALF, 9), first + HALF]
        write_data_set(folder / name, [range(*pair) for pair in itertools.pairwise(bounds)])
    return folder


@pytest.fixture
def targets(monkeypatch):
    """The ids that steps were handed as targets."""
    found, read = [], BatchLoader.__next__

    def recorded(loader):
        batch = read(loader)
        found.extend(batch.ids[..., 1:].flatten().tolist())
        return batch

    monkeypatch.setattr(BatchLoader, "__next__", recorded)
    return found


def configure(folder, save, training, *weights, growth=(), **checkpoint):
    """Write the configuration of a job that saves to `save`, and return its path."""
    paths = [f"{weight} {folder / name}" for weight, name in weights]
    config = to_dict(
        small_run(
            model={"vocab_size": 257},
            training=training,
            data={"data_path": paths, "split": "1,0,0", "order": "lanes"},
            optimizer={"lr_decay_style": "constant"},
            checkpoint={"save": str(folder / save), "allow_changes": ["data"], **checkpoint},
            logging={"metrics_file": str(folder / f"{save}.jsonl")},
        )
    )
    config["growth"] = [*growth]
    path = folder / f"{save}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def jobs_of(folder, save, **options):
    """The jobs of a run whose weights, sequence lengths and batch sizes change; it grows in the second one."""
    growth = [{"at_step": 4, "ffn_tokens": 128}]
    changes = [
        (FIRST, [(0.75, "a"), (0.25, "b")]),
        (SECOND, [(0.4, "a"), (0.6, "b")]),
        (THIRD, [(1.0, "b")]),
    ]
    for training, weights in changes:
        yield lambda training=training, weights=weights: configure(
            folder, save, training, *weights, growth=growth, **options
        )


def test_a_run_reads_every_token_once_through_changes_of_everything_and_a_growth(folder, targets, capsys):
    for configured in jobs_of(folder, "whole"):
        assert pretrain.main([str(configured())]) == 0
    assert len(targets) == 2 * 4 * 8 + 3 * 2 * 16 + 8 * 4
    assert len(set(targets)) == len(targets)
    said = capsys.readouterr().out
    assert said.count("every set continues where it was left") == 2
    phase = CheckpointReader(folder / "whole").record.details.phase
    assert (phase["first"], phase["seq_length"], list(phase["weights"])) == (14, 4, ["b"])
    assert {name: state["left_out"] for name, state in phase["sets"].items()} == {"a": 0, "b": 0}
    read = {name: sum(length * visits for length, visits in state["cuts"]) for name, state in phase["sets"].items()}
    assert sum(read.values()) + 8 * 4 == len(targets)


def test_a_job_that_stops_and_resumes_reads_what_one_that_does_not_reads(folder, targets):
    assert pretrain.main([str(configure(folder, "at once", FIRST, (0.75, "a"), (0.25, "b")))]) == 0
    whole = [*targets]
    targets.clear()
    config = str(configure(folder, "in parts", FIRST, (0.75, "a"), (0.25, "b")))
    assert pretrain.main([config, "--training.train_iters=1"]) == 0
    assert pretrain.main([config]) == 0
    assert targets == whole


def flip_a_byte(checkpoint):
    path = checkpoint / FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("lose", [shutil.rmtree, flip_a_byte], ids=["removed", "damaged"])
def test_a_rewind_to_a_checkpoint_of_an_earlier_phase_repeats_no_token(folder, targets, monkeypatch, capsys, lose):
    both, save = [(0.5, "a"), (0.5, "b")], f"rewound {lose.__name__}"
    assert pretrain.main([str(configure(folder, save, FIRST, *both, save_interval=1))]) == 0
    losses = []

    def is_spike(detector, loss):
        losses.append(loss)
        detector.in_a_row = int(len(losses) == 2)
        if detector.in_a_row:  # the checkpoint from which this job was resumed
            lose(folder / save / "step_00000002")
        return bool(detector.in_a_row)

    monkeypatch.setattr(SpikeDetector, "is_spike", is_spike)
    second = {**SECOND, "train_iters": 4, "rewind_after_spikes": 1}
    third = {**THIRD, "train_iters": 5, "global_batch_size": 4}
    assert pretrain.main([str(configure(folder, save, second, *both))]) == 0
    said = capsys.readouterr().out
    assert "step_00000001; skipping data up to sample 12" in said
    assert (f"{FILE} is damaged: its checksum does not match" in said) == (lose is flip_a_byte)
    assert pretrain.main([str(configure(folder, save, third, *both))]) == 0
    assert len(targets) == 2 * 4 * 8 + 5 * 2 * 16 + 4 * 4
    assert len(set(targets)) == len(targets)
    record = CheckpointReader(folder / save).record
    states = record.details.phase["sets"].values()
    # the checkpoint was at sample 4, in the first phase: another 4 samples of it and 4 of the second are rewound
    assert sum(state["rewound"] for state in states) == 4 * 8 + 4 * 16
    assert (record.training.samples, record.training.skipped) == (8 + 10 + 4, 3)


def test_two_ranks_read_what_one_reads_through_all_changes(folder):
    for save, ranks in (("one rank", 1), ("two ranks", 2)):
        for configured in jobs_of(folder, save):
            done = run("megatron_tf.pretrain", configured(), ranks=ranks)
            assert done.returncode == 0, done.stderr
    one, two = (CheckpointReader(folder / name).record for name in ("one rank", "two ranks"))
    assert one.details.phase == two.details.phase
    curves = [losses_of(folder / f"{name}.jsonl") for name in ("one rank", "two ranks")]
    assert len(curves[0]) == 6
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def losses_of(path):
    return [values["loss"] for values in map(json.loads, path.read_text().splitlines()) if "loss" in values]
