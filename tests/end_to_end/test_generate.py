"""The command line of generation: where prompts come from, where texts go, what it says to mistakes."""

import io
import json
import sys
import time

import pytest

from megatron_tf.generate import main
from tests.support.commands import ENVIRONMENT, run
from tests.support.models import random_model, write_checkpoint
from tests.support.processes import PythonProcess

OPTIONS = ["--max-new-tokens", "12", "--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "3"]
SAMPLED = ["--max-new-tokens", "12", "--temperature", "2", "--seed", "3"]
PROMPTS = ["the quick", "a €", "one two three four five six seven"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model of bytes with random weights."""
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint", random_model())


@pytest.fixture
def generate(capsys, monkeypatch):
    """The command in this process: (exit code, output, errors)."""

    def call(*arguments, stdin="\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_prompts_from_anywhere_give_the_same_texts(checkpoint, tmp_path, generate):
    batch = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    code, together, _ = generate(checkpoint, *batch, *OPTIONS)
    records = [json.loads(line) for line in together.splitlines()]
    assert code == 0
    assert [record["prompt"] for record in records] == PROMPTS
    assert all(record["finish_reason"] in ("length", "eod") and record["text"] for record in records)
    assert generate(checkpoint, "--prompt", PROMPTS[1], *OPTIONS)[1] == f"{PROMPTS[1]}{records[1]['text']}\n"
    assert generate(checkpoint, *OPTIONS, stdin="\n".join(PROMPTS) + "\n\n")[1] == together

    lines = [json.dumps({"id": i, "prompt": prompt}) for i, prompt in enumerate(PROMPTS)]
    for name, text in (("prompts.txt", "\n".join(PROMPTS)), ("prompts.jsonl", "\n".join(lines) + "\n")):
        (tmp_path / name).write_text(text)
    files = ["--prompt-file", tmp_path / "prompts.txt", "--batch-size", "2"]
    assert generate(checkpoint, *files, *OPTIONS)[1] == together
    files = ["--prompt-file", tmp_path / "prompts.jsonl", "--output", tmp_path / "out"]
    assert generate(checkpoint, *files, *OPTIONS)[:2] == (0, "")
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert found == [{"id": i} | record for i, record in enumerate(records)]

    stop = records[2]["text"][4:6]
    stopped = generate(checkpoint, "--prompt", PROMPTS[2], "--stop", stop, *OPTIONS)[1]
    assert stopped == PROMPTS[2] + records[2]["text"].partition(stop)[0] + "\n"


def test_samples_of_a_prompt_are_independent_and_reproducible_whatever_else_is_in_the_batch(checkpoint, generate):
    batch = [part for prompt in PROMPTS[:2] for part in ("--prompt", prompt)]
    code, text, _ = generate(checkpoint, *batch, *SAMPLED, "--num-samples", "4")
    records = [json.loads(line) for line in text.splitlines()]
    assert code == 0
    assert [(record["prompt"], record["sample"]) for record in records] == [
        (p, i) for p in PROMPTS[:2] for i in range(4)
    ]
    assert len({record["text"] for record in records}) == 8

    # the first is the one without the option; fewer samples, other batches and other prompts change none of the others
    alone = [json.loads(line)["text"] for line in generate(checkpoint, *batch, *SAMPLED)[1].splitlines()]
    assert alone == [records[0]["text"], records[4]["text"]]
    again = generate(checkpoint, "--prompt", PROMPTS[1], *SAMPLED, "--num-samples", "3", "--batch-size", "1")[1]
    assert [json.loads(line) for line in again.splitlines()] == records[4:7]
    other = generate(checkpoint, "--prompt", PROMPTS[1], *SAMPLED, "--seed", "4", "--num-samples", "4")[1]
    assert not {json.loads(line)["text"] for line in other.splitlines()} & {record["text"] for record in records}


def test_samples_of_each_line_of_a_file_keep_its_keys(checkpoint, tmp_path, generate):
    (tmp_path / "prompts.jsonl").write_text('{"id": "x", "prompt": "a"}\n{"id": "y", "prompt": "b"}\n')
    files = ["--prompt-file", tmp_path / "prompts.jsonl", "--output", tmp_path / "out"]
    assert generate(checkpoint, *files, *OPTIONS, "--num-samples", "2", "--batch-size", "3")[0] == 0
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [(record["id"], record["sample"]) for record in found] == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]


def test_ranks_of_torchrun_give_one_text_that_of_one_process(checkpoint, generate):
    arguments = [checkpoint, "--prompt", PROMPTS[0], *OPTIONS]
    shared = run("megatron_tf.generate", *arguments, ranks=2)
    assert (shared.returncode, shared.stdout) == (0, generate(*arguments)[1]), shared.stderr


def test_tokens_are_written_as_they_come(checkpoint):
    """The prompt is there before the process has ended."""
    command = [sys.executable, "-m", "megatron_tf.generate", str(checkpoint), "--prompt", "the quick"]
    process = PythonProcess([*command, "--max-new-tokens", "1000000"], environment=ENVIRONMENT)
    try:
        written, limit = "", time.monotonic() + 60
        while len(written) < 200:
            assert time.monotonic() < limit, written
            time.sleep(0.05)
            written += process.read()
        assert written.startswith("the quick")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "--prompt", "a"], "nowhere does not exist"),
        (["{checkpoint}", "--prompt", "a", "--top-p", "2"], "top_p (2.0) must be above 0"),
        (["{checkpoint}", "--prompt", "a", "--stop", ""], "a stop string is empty"),
        (["{checkpoint}", "--prompt", "a", "--batch-size", "0"], "--batch-size (0) must be 1 or more"),
        (["{checkpoint}", "--prompt", "a", "--num-samples", "0"], "--num-samples (0) must be 1 or more"),
        (
            ["{checkpoint}", "--prompt", "a", "--num-samples", "3", "--temperature", "0"],
            "would give the same text 3 times",
        ),
        (["{checkpoint}", "--prompt", "a", "--num-samples", "2", "--top-k", "1"], "would give the same text 2 times"),
        (["{checkpoint}", "--prompt-file", "{folder}/none"], "No such file"),
        (["{checkpoint}", "--prompt-file", "{folder}/empty"], "empty holds no prompt"),
        (["{checkpoint}", "--prompt-file", "{folder}/a.jsonl"], "a.jsonl, line 2 is not an object with a text"),
        (["{checkpoint}", "--prompt-file", "{folder}/b.jsonl"], "b.jsonl, line 1 is not JSON"),
        (["{checkpoint}"], "the standard input holds no prompt"),
    ],
)
def test_a_mistake_ends_with_one_clear_line(checkpoint, tmp_path, generate, arguments, message):
    files = {"a.jsonl": '{"prompt": "a"}\n{"text": "b"}\n', "b.jsonl": "prompt\n", "empty": "\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, _, errors = generate(*(part.format(checkpoint=checkpoint, folder=tmp_path) for part in arguments))
    assert code == 1
    assert errors.startswith("error: ")
    assert message in errors
    assert len(errors.splitlines()) == 1
