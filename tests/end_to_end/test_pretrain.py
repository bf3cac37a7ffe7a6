"""From text to a grown, continued run through the command lines, and what they say to mistakes."""

import json
import sys
import time

import pytest

from tests.support.commands import ENVIRONMENT, make_run, run
from tests.support.processes import run_python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of bytes and a configuration."""
    return make_run(tmp_path_factory.mktemp("run"))


def test_train_resume_grow_continue_generate(folder):
    save, metrics = folder / "base", folder / "metrics.jsonl"
    options = [f"--checkpoint.save={save}", f"--logging.metrics_file={metrics}", "--training.eval_interval=2"]
    parallel = ["--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true"]
    options += ["--training.eval_iters=1", "--logging.log_interval=1"]
    first = run("megatron_tf.pretrain", folder / "run.yaml", *options, *parallel, ranks=2)
    assert first.returncode == 0, first.stderr
    assert "validation loss" in first.stdout
    longer = "--checkpoint.allow_changes=[training.train_iters]"
    again = run("megatron_tf.pretrain", folder / "run.yaml", *options, "--training.train_iters=6", longer)
    assert again.returncode == 0, again.stderr
    assert "at step 4" in again.stdout
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    stages = ["--target-pipeline-parallel-size", "2", "--grow", "ffn=128", "--verify"]
    grown = run("tools/reshard_checkpoint.py", "--load", save, "--save", folder / "grown", *stages)
    assert grown.returncode == 0, grown.stderr
    assert "verified" in grown.stdout
    options = [f"--checkpoint.load={folder / 'grown'}", f"--checkpoint.save={folder / 'after'}"]
    options += ["--model.ffn_tokens=128", "--parallel.pipeline_model_parallel_size=2", "--training.train_iters=8"]
    after = run("megatron_tf.pretrain", folder / "run.yaml", *options, longer, ranks=2)
    assert after.returncode == 0, after.stderr
    text = run("megatron_tf.generate", folder / "after", "--prompt", "the quick", "--max-new-tokens", "5")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("the quick")
    other = run("megatron_tf.pretrain", folder / "run.yaml", f"--checkpoint.save={save}", "--model.num_layers=2")
    assert other.returncode == 1
    assert "another model" in other.stderr


@pytest.mark.parametrize(
    "override, message",
    [
        ("--model.hiden_size=1", "did you mean 'hidden_size'?"),
        ("--data.data_path=[nowhere]", "nowhere.idx is missing"),
        ("--model.vocab_size=300", "set model.vocab_size to that"),
        ("--parallel.tensor_model_parallel_size=2", "the world has 1 rank(s)"),
        ("--data.tokenizer_type=NulTokenizer", "did you mean NullTokenizer?"),
        ("--checkpoint.load=nowhere", "nowhere does not exist"),
        ("--training.seq_length=100000", "too few for one sample"),
    ],
)
def test_a_mistake_ends_with_one_clear_error(folder, override, message):
    done = run("megatron_tf.pretrain", folder / "run.yaml", override)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_data_made_with_another_tokenizer(folder):
    report = folder / "data_text_document.json"
    original = report.read_text()
    report.write_text(original.replace("NullTokenizer", "HFTokenizer"))
    try:
        done = run("megatron_tf.pretrain", folder / "run.yaml")
    finally:
        report.write_text(original)
    assert done.returncode == 1
    assert "another tokenizer" in done.stderr


def test_a_full_disk_under_the_metrics_does_not_end_the_run(folder):
    done = run("megatron_tf.pretrain", folder / "run.yaml", "--logging.metrics_file=/dev/full")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: /dev/full: [Errno 28] No space left on device; training continues") == 1


def test_a_place_that_cannot_be_written_is_named_before_the_first_step(folder):
    (folder / "in the way").touch()
    done = run("megatron_tf.pretrain", folder / "run.yaml", f"--checkpoint.save={folder / 'in the way' / 'run'}")
    assert done.returncode == 1
    assert "checkpoint.save can't be written: [Errno 20] Not a directory" in done.stderr
    assert "step" not in done.stdout


def test_truncated_data(folder):
    path = folder / "data_text_document.bin"
    original = path.read_bytes()
    path.write_bytes(original[:-7])
    try:
        done = run("megatron_tf.pretrain", folder / "run.yaml")
    finally:
        path.write_bytes(original)
    assert done.returncode == 1
    assert "truncated" in done.stderr


def test_one_failing_rank_ends_all_within_a_minute(folder):
    """Rank 1 alone, in another directory, does not find the data; the launcher must end with its error."""
    script = folder / "one_rank.py"
    script.write_text(
        "import os, sys\n"
        "from megatron_tf.pretrain import main\n"
        f"os.chdir('/' if os.environ['RANK'] == '1' else {str(folder)!r})\n"
        "options = ['--parallel.tensor_model_parallel_size=2', '--data.data_path=[data_text_document]']\n"
        f"sys.exit(main([{str(folder / 'run.yaml')!r}, *options]))\n"
    )
    start = time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    done = run_python(command, environment=ENVIRONMENT)
    assert done.returncode != 0
    assert "[rank 1] error: " in done.stderr
    assert "rank 1 (host" in done.stderr
    assert "data.data_path: data_text_document.bin is missing" in done.stderr
    assert time.monotonic() - start < 60
