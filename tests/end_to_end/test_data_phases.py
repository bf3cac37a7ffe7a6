"""`data.phases`: new weights, sets, lengths and batch sizes within a run, in which every token is still read once."""

import itertools
import json
from collections import Counter

import pytest
import yaml

from megatron_tf import pretrain
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.commands import inspect_checkpoint
from megatron_tf.config import to_dict
from megatron_tf.data.phases import Phase
from megatron_tf.tokenformer.sizes import training_flops
from megatron_tf.training.observability.data_lines import counts_of
from tests.support import commands
from tests.support.commands import run
from tests.support.data import write_data_set, write_tokenizer
from tests.support.recorded_run import read_records
from tests.support.training import small_run

SETS = {"a": range(300), "b": range(300, 420), "c": range(420, 820)}
"""The ids of each set: every token is unique."""
GROWTH = [{"at_step": 5, "ffn_tokens": 128}]
PHASES = [
    {"at_step": 3, "seq_length": 16, "global_batch_size": 4, "data_path": ["0.4 a", "0.6 b"]},
    {"at_step": 5, "micro_batch_size": 2, "global_batch_size": 4, "data_path": ["1 b", "3 c"]},
    {"at_tokens": 3 * 64 + 2 * 64 + 2 * 64, "seq_length": 8, "global_batch_size": 8, "data_path": ["1 a", "2 c"]},
    {"at_step": 9, "seq_length": 4},
]
TOKENS = [64, 64, 64, 64, 64, 64, 64, 64, 64, 32, 32, 32]
"""Of each step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    write_tokenizer(folder / "tokenizer.json", 820)
    for name, ids in SETS.items():
        bounds = [*ids[::9], ids.stop]
        write_data_set(folder / name, [range(*pair) for pair in itertools.pairwise(bounds)])
    return folder


def paths(folder, entries):
    return [f"{weight} {folder / name}" for weight, name in map(str.split, entries)]


def configure(folder, save, *, phases=PHASES, growth=GROWTH, data=("0.75 a", "0.25 b"), **sections):
    """Write the configuration of a run of 12 steps, and return its path."""
    training = {"train_iters": 12, "seq_length": 8, "global_batch_size": 8, "micro_batch_size": 1}
    config = to_dict(
        small_run(
            model={"vocab_size": 820},
            training=training | sections.pop("training", {}),
            optimizer={"lr_decay_style": "constant"} | sections.pop("optimizer", {}),
            data={
                "data_path": paths(folder, data),
                "split": "1,0,0",
                "order": None,
                "tokenizer_type": "HFTokenizer",
                "tokenizer_model": str(folder / "tokenizer.json"),
            }
            | sections.pop("keys", {}),
            checkpoint={"save": str(folder / save), "save_interval": 4} | sections.pop("checkpoint", {}),
            logging={"metrics_file": str(folder / f"{save}.jsonl"), "log_interval": 1},
            **sections,
        )
    )
    config["growth"] = [*growth]
    config["data"]["phases"] = [
        phase | ({"data_path": paths(folder, phase["data_path"])} if "data_path" in phase else {}) for phase in phases
    ]
    path = folder / f"{save}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def record(folder, save, *options, ranks=1, **environment):
    """Run a job that records its targets, with variables of `recorded_run`."""
    commands.ENVIRONMENT.update(environment)
    try:
        files = folder / f"{save}.record", folder / f"{save}.yaml"
        return run("tests.support.recorded_run", *files, *options, ranks=ranks)
    finally:
        for name in environment:
            del commands.ENVIRONMENT[name]


def lines_of(folder, save):
    return [json.loads(line) for line in (folder / f"{save}.jsonl").read_text().splitlines()]


def steps_of(folder, save):
    return [line for line in lines_of(folder, save) if "loss" in line and "event" not in line]


def data_events(folder, save):
    return [line for line in lines_of(folder, save) if line.get("event") == "data"]


def check_exactly_once(targets, record):
    """Compare the targets of all samples with what the checkpoint says has been read of each set."""
    assert sorted(targets) == [*range(record.training.samples)]
    count = Counter(itertools.chain.from_iterable(targets.values()))
    for name, state in data_states(record).items():
        ids, epochs = SETS[name], state["epoch"] + 1
        of_set = [count[token] for token in ids]
        assert max(of_set) <= epochs
        assert sum(of_set) == state["read"] == state["epoch"] * len(ids) - state["tail"] + state["read_of_epoch"]
        # a token that is read too often makes another one miss
        assert sum(max(0, epochs - 1 - number) for number in of_set) <= state["tail"]


def data_states(record):
    states = Phase.from_json(record.details.phase).states_at(record.training.samples)
    return {name: counts_of(state) for name, state in states.items()}


def test_a_run_reads_every_token_once_through_phases_growth_kills_and_changes_of_ranks(folder):
    """Two data-parallel ranks, killed; one rank, killed; two tensor-parallel ranks: as one rank in one job."""
    configure(folder, "whole")
    done = record(folder, "whole")
    assert done.returncode == 0, done.stderr
    configure(folder, "killed")
    tp = ["--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true"]
    killed = [
        record(folder, "killed", ranks=2, KILL_AFTER="6"),
        record(folder, "killed", KILL_AFTER="5"),
        record(folder, "killed", *tp, ranks=2),
    ]
    assert [done.returncode == 0 for done in killed] == [False, False, True], killed[-1].stderr
    targets = [read_records(folder, f"{save}.record") for save in ("whole", "killed")]
    assert targets[0] == targets[1]
    records = [CheckpointReader(folder / save).record for save in ("whole", "killed")]
    assert records[0].details.phase == records[1].details.phase
    assert [record_.details.phases for record_ in records] == [4, 4]
    for found, record_ in zip(targets, records, strict=True):
        check_exactly_once(found, record_)
    assert len(CheckpointReader(folder / "whole").record.lineage) == 1
    curves = [{line["step"]: line["loss"] for line in steps_of(folder, save)} for save in ("whole", "killed")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_metrics_and_counts_follow_the_lengths_and_batch_sizes_in_force(folder):
    training = {"eval_interval": 3, "eval_iters": 1, "train_iters": 11}
    config = configure(folder, "metrics", keys={"valid_data_path": [str(folder / "c")]}, training=training)
    assert pretrain.main([str(config)]) == 0
    steps = steps_of(folder, "metrics")
    assert [line["tokens"] for line in steps] == [*itertools.accumulate(TOKENS[:11])]
    record_ = CheckpointReader(folder / "metrics").record
    models = [small_run(model={"vocab_size": 820}).model, record_.model]
    lengths = [8] * 3 + [16] * 4 + [8] * 2 + [4] * 2
    flops = [t * training_flops(models[i >= 5], s) for i, (t, s) in enumerate(zip(TOKENS, lengths, strict=False))]
    assert record_.usage.flops == sum(flops)
    assert record_.config["training"]["seq_length"] == 4
    assert [line["step"] for line in lines_of(folder, "metrics") if "validation_loss" in line] == [3, 6, 9, 11]


def test_a_resume_in_the_middle_of_a_phase_is_the_same_bit_for_bit(folder):
    config = configure(folder, "straight")
    assert pretrain.main([str(config)]) == 0
    config = configure(folder, "parts")
    for steps in (2, 3, 4, 6, 7, 8):
        assert pretrain.main([str(config), f"--training.train_iters={steps}"]) == 0
    assert pretrain.main([str(config)]) == 0
    left, right = CheckpointReader(folder / "straight"), CheckpointReader(folder / "parts")
    assert list(differences(left, right)) == []
    assert left.record.details == right.record.details
    assert left.record.training == right.record.training


def test_what_is_left_out_is_counted_and_reported_by_set(folder, capsys):
    phases = [{"at_step": 4, "data_path": ["1 b"], "seq_length": 16, "global_batch_size": 4}]
    configure(folder, "skipped", growth=(), phases=phases, training={"train_iters": 20})
    done = record(folder, "skipped", SKIP="16")
    assert done.returncode == 0, done.stderr
    events = data_events(folder, "skipped")
    assert next((event["reason"], event["step"]) for event in events) == ("phase", 4)
    assert {event["reason"] for event in events} == {"phase", "epoch", "end"}
    final = events[-1]
    assert (final["reason"], final["step"], final["samples"]) == ("end", 20, 5 * 8 + 16 * 4)
    targets = read_records(folder, "skipped.record")
    skipped = Counter(token >= 300 for sample in range(16, 24) for token in targets[sample])
    assert [final["sets"][name]["skipped"] for name in "ab"] == [skipped[False], skipped[True]]
    assert final["sets"]["b"]["tail"] > 0
    record_ = CheckpointReader(folder / "skipped").record
    assert data_states(record_) == final["sets"]
    assert inspect_checkpoint.main([str(folder / "skipped")]) == 0
    b, counts = final["sets"]["b"], ("read", "read_of_epoch", "tail", "skipped", "rewound")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  b "))
    assert line.split() == ["b", str(b["epoch"] + 1), *(f"{b[key]:,}" for key in counts)]
    check_exactly_once(targets, record_)
    (fault,) = [line for line in lines_of(folder, "skipped") if line.get("event") == "skipped"]
    assert (fault["first_sample"], fault["samples"]) == (16, 24)
    assert f"a: {skipped[False]} in skipped batches; b: " in done.stdout


def test_a_new_run_reads_in_lanes_and_a_resumed_one_keeps_its_order(folder, capsys):
    config = configure(folder, "kept", phases=(), growth=())
    options = [str(config), "--training.train_iters=2"]
    assert pretrain.main([*options, "--data.order=counter"]) == 0
    assert CheckpointReader(folder / "kept").record.data["order"] == "counter"
    assert pretrain.main([str(config), "--training.train_iters=3"]) == 0
    record_ = CheckpointReader(folder / "kept").record
    assert (record_.data["order"], record_.details.phase) == ("counter", None)
    capsys.readouterr()
    assert pretrain.main([str(config), "--training.train_iters=4", "--data.order=lanes"]) == 1
    assert "data.order 'counter' -> 'lanes'" in capsys.readouterr().err
    phases = "--data.phases=[{at_step: 3, seq_length: 16}]"
    assert pretrain.main([str(config), "--training.train_iters=4", phases]) == 1
    assert "data.phases needs data.order lanes, but" in capsys.readouterr().err
    assert pretrain.main([str(configure(folder, "new", phases=(), growth=())), "--training.train_iters=1"]) == 0
    assert CheckpointReader(folder / "new").record.data["order"] == "lanes"


@pytest.mark.parametrize(
    "phase, message",
    [
        ({"at_step": 3, "data_path": ["1 gone"]}, "data.phases[0]: data.data_path: "),
        ({"at_step": 3, "seq_length": 301}, "data.phases[0]: a has 300 tokens, too few for one sample of 301"),
        ({"at_step": 3, "global_batch_size": 3, "micro_batch_size": 2}, "data.phases[0]: global_batch_size (3)"),
        ({"at_step": 3}, "data.phases.0: changes nothing"),
        ({"seq_length": 4}, "data.phases[0]: give either at_step or at_tokens"),
    ],
)
def test_a_phase_that_cannot_be_is_refused_before_the_first_step(folder, capsys, phase, message):
    config = configure(folder, "refused", phases=[phase], growth=())
    assert pretrain.main([str(config)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (folder / "refused.jsonl").exists()


def test_sets_of_one_name_in_two_phases_are_refused(folder, capsys):
    (folder / "elsewhere").mkdir()
    write_data_set(folder / "elsewhere" / "a", [range(400)])
    config = configure(folder, "twins", phases=[{"at_step": 3, "data_path": ["1 elsewhere/a"]}], growth=())
    assert pretrain.main([str(config)]) == 1
    assert "have the same name, by which data.order lanes knows a set" in capsys.readouterr().err
