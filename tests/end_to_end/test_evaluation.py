"""Evaluation by its command lines, each figure against a loop over the plain model."""

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from megatron_tf import evaluate, lm_eval
from megatron_tf.commands import preprocess_data
from megatron_tf.data.document_sets import sets_path
from megatron_tf.data.output_names import mask_prefix
from megatron_tf.errors import UserError
from megatron_tf.inference.lm_eval_model import MegatronTF
from megatron_tf.inference.model import load_model
from tests.support.commands import ENVIRONMENT, free_port
from tests.support.data import write_data_set
from tests.support.models import SEQ_LENGTH, random_model, write_checkpoint
from tests.support.processes import run_ranks

EOD = 256
DOCUMENTS = [
    ("Books", "It was a bright cold day in April, and the clocks were striking."),
    ("Code", "x = 1"),
    ("Books", "naïve café " * 7),
    ("Empty", ""),
    ("Code", "日本語のテキスト" * 3),
]
QUESTIONS = [
    {"question": "A dog is", "choices": ["an animal", "a stone of the longest and coldest river"], "label": 0},
    {"question": "Rain is ", "choices": ["dry", "wet", "3"], "label": 1},
    {"question": "What is said of the clocks of April in " * 3, "choices": ["they strike", "nothing"], "label": 1},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model of bytes."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), random_model())


@pytest.fixture(scope="module")
def model(checkpoint):
    """The same."""
    return load_model(checkpoint)


@torch.no_grad()
def log_likelihood(model, ids, first, window=SEQ_LENGTH, stride=SEQ_LENGTH, counts=None):
    """Sum over ids[first:] that count, one call for each id: it sees what its window begins with."""
    total, done = 0.0, first
    for i in range(first, len(ids)):
        if i == done:
            done = min(len(ids), i + (window if i == first else stride))
        seen = ids[max(0, done - 1 - window) : i]
        logits = model(torch.tensor([seen]))[0, -1]
        if counts is None or counts[i]:
            total += float(torch.log_softmax(logits, -1)[ids[i]])
    return total


def write_data(folder, *more):
    """The documents as a data set; its prefix."""
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": name}}) for name, text in DOCUMENTS]
    (folder / "text.jsonl").write_text("\n".join(lines))
    options = ["--input", str(folder / "text.jsonl"), "--output-prefix", str(folder / "data")]
    assert preprocess_data.main([*options, "--tokenizer-type", "NullTokenizer", *more]) == 0
    return folder / "data_text_document"


@pytest.mark.parametrize("options, stride", [([], SEQ_LENGTH), (["--stride", "5", "--batch-size", "3"], 5)])
@pytest.mark.parametrize("more", [["--append-eod"], []])
def test_perplexity_of_each_set_is_that_of_the_plain_model(checkpoint, model, tmp_path, options, stride, more):
    prefix = write_data(tmp_path, *more)
    arguments = [str(checkpoint), "--data-path", str(prefix), "--output", str(tmp_path / "out.json"), *options]
    assert evaluate.main(arguments) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    for name in ("Books", "Code"):
        texts = [text.encode() for of_set, text in DOCUMENTS if of_set == name]
        nats = -sum(log_likelihood(model, [EOD, *text], 1, stride=stride) for text in texts)
        size, figures = sum(map(len, texts)), result["sets"][name]
        assert (figures["documents"], figures["tokens"], figures["text_bytes"]) == (2, size, size)
        assert figures["nats_per_token"] == pytest.approx(nats / size, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-4)
        assert figures["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert result["sets"]["Empty"]["perplexity"] is None
    parts = [result["sets"][name] for name in ("Books", "Code", "Empty")]
    assert result["all"]["documents"] == sum(part["documents"] for part in parts) == 5
    assert result["all"]["text_bytes"] == sum(part["text_bytes"] for part in parts)


def test_a_part_of_data_without_sets_is_one_set_of_the_decoded_bytes(checkpoint, model, tmp_path):
    prefix = write_data(tmp_path, "--append-eod")
    sets_path(prefix).unlink()
    arguments = [str(checkpoint), "--data-path", str(prefix), "--output", str(tmp_path / "out.json")]
    assert evaluate.main([*arguments, "--split", "2,2,1", "--part", "validation"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["sets"]) == ["data_text_document"]
    assert (result["all"]["documents"], result["all"]["text_bytes"]) == (2, len(DOCUMENTS[2][1].encode()))
    nats = -log_likelihood(model, [EOD, *DOCUMENTS[2][1].encode()], 1)
    assert result["all"]["nats_per_token"] * result["all"]["tokens"] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("more", [[], ["--stride", "5"], ["--all-tokens"]])
def test_of_chat_data_only_the_answers_count(checkpoint, model, tmp_path, more):
    texts = [text.encode() for _, text in DOCUMENTS[:2]]
    answers = [[i % 3 == 0 or i > 30 for i in range(len(text))] for text in texts]
    prefix = write_data_set(tmp_path / "chat", [[*text, EOD] for text in texts])
    write_data_set(mask_prefix(prefix), [[*answer, True] for answer in answers], np.uint8)
    arguments = [str(checkpoint), "--data-path", str(prefix), "--output", str(tmp_path / "out.json")]
    assert evaluate.main([*arguments, *more]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())["all"]
    if more == ["--all-tokens"]:
        answers = [[True] * len(text) for text in texts]
    stride = 5 if more == ["--stride", "5"] else SEQ_LENGTH
    nats = -sum(
        log_likelihood(model, [EOD, *text], 1, stride=stride, counts=[False, *answer])
        for text, answer in zip(texts, answers, strict=True)
    )
    targets = sum(map(sum, answers))
    assert (figures["tokens"], figures["text_bytes"]) == (targets, targets)
    assert figures["nats_per_token"] == pytest.approx(nats / targets, rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data-path", "nowhere"], "nowhere.idx is missing"),
        (["--stride", "25"], "windows of 16 tokens can't move by 25"),
        (["--batch-size", "0"], "--batch-size is 0: it must be 1 or more"),
        (["--split", "1,1"], "write three shares"),
        (["--split", "1,0,0"], "the test part of --split 1,0,0 of "),
        (["--split", "1,0,0"], " holds no token to predict"),
        (["--device", "there_is_none"], "device there_is_none can't be used here"),
        (["--device", "meta"], "device meta can't be used here: its tensors have no values"),
    ],
)
def test_mistakes_end_with_one_clear_line(checkpoint, tmp_path, capsys, options, message):
    prefix = write_data(tmp_path)
    assert evaluate.main([str(checkpoint), "--data-path", str(prefix), *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_part_belongs_to_a_split(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(checkpoint), "--data-path", str(tmp_path), "--part", "validation"])
    assert left.value.code == 2
    assert "--part validation is a part of --split, which is not given" in capsys.readouterr().err


def test_the_folder_of_the_results_is_made(checkpoint, tmp_path):
    output = tmp_path / "new" / "results.json"
    assert evaluate.main([str(checkpoint), "--data-path", str(write_data(tmp_path)), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["split"] is None


def write_tasks(folder):
    """Four tasks of lm-eval, one of each kind of request, over local files."""
    tasks = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "label",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "last_word": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": " {{choices[0]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "generation": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    data["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "test", **data, **task}))
    return ",".join(tasks)


def run_on_two_ranks(checkpoint, folder):
    """(results of tasks, samples of tasks) of the command, run away from the source tree."""
    options = ["--tasks", write_tasks(folder), "--include_path", str(folder), "--output_path", str(folder / "out")]
    options += ["--model", "megatron_tf", "--model_args", f"checkpoint={checkpoint}", "--batch_size", "2"]
    done = run_ranks(
        [sys.executable, "-m", "megatron_tf.lm_eval", "run", *options, "--log_samples"],
        2,
        environment={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
        port=free_port(),
        cwd=folder,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    results = next((folder / "out").rglob("results_*.json"))
    samples = {}
    for path in results.parent.glob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        samples[path.name.split("_2")[0].removeprefix("samples_")] = rows
    return json.loads(results.read_text())["results"], samples


@pytest.fixture(scope="module")
def of_one_rank(checkpoint, tmp_path_factory):
    """(results of tasks, samples of tasks in order) that lm-eval finds in this process."""
    folder = tmp_path_factory.mktemp("one")
    tasks, manager = write_tasks(folder), TaskManager(include_path=str(folder), include_defaults=False)
    lm_eval.register()
    found = simple_evaluate("megatron_tf", f"checkpoint={checkpoint}", tasks.split(","), task_manager=manager)
    return found["results"], found["samples"]


def test_lm_evals_scores_are_those_of_the_plain_model(model, of_one_rank):
    results, samples = of_one_rank
    right, right_by_length, of_words, rolled = [], [], [], []
    for i, row in enumerate(QUESTIONS):
        question = row["question"].encode()
        expected = []
        for j, choice in enumerate(row["choices"]):
            ids = [*question, *f" {choice}".encode()]
            expected.append(log_likelihood(model, ids, len(question.rstrip())))  # a last space counts as an answer's
            assert float(samples["choices"][i]["resps"][j][0][0]) == pytest.approx(expected[j], abs=1e-3)
        lengths = [len(choice) for choice in row["choices"]]
        right.append(expected.index(max(expected)) == row["label"])
        scaled = [value / length for value, length in zip(expected, lengths, strict=True)]
        right_by_length.append(scaled.index(max(scaled)) == row["label"])
        of_words.append(expected[0])
        rolled.append(log_likelihood(model, [EOD, *question], 1))
    size = sum(len(row["question"].encode()) for row in QUESTIONS)
    assert results["choices"]["acc,none"] == sum(right) / 3
    assert results["choices"]["acc_norm,none"] == sum(right_by_length) / 3
    assert results["last_word"]["perplexity,none"] == pytest.approx(math.exp(-sum(of_words) / 3), rel=1e-3)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(-sum(rolled) / size / math.log(2), rel=1e-5)


@torch.no_grad()
def test_lm_eval_generates_as_the_plain_model(model, of_one_rank):
    _, samples = of_one_rank
    for i, row in enumerate(QUESTIONS):
        ids = list(row["question"].encode())[-(SEQ_LENGTH - 6) :]
        new = []
        while len(new) < 6 and (not new or new[-1] not in (EOD, ord("\n"))):
            new.append(int(model(torch.tensor([ids + new]))[0, -1, :257].argmax()))
        text = bytes(itertools.takewhile(lambda token: token not in (EOD, ord("\n")), new)).decode(errors="replace")
        assert samples["generation"][i]["resps"][0][0] == text


def log_likelihoods(answers):
    """Of the answers to one row, alone or together with whether they are greedy; files hold numbers as texts."""
    return [float(answer[0] if isinstance(answer, (list, tuple)) else answer) for answer in answers]


def test_two_ranks_find_what_one_finds(checkpoint, of_one_rank, tmp_path):
    results, samples = run_on_two_ranks(checkpoint, tmp_path)
    one, alone = of_one_rank
    for task, rows in alone.items():
        answers = {row["doc_id"]: row["filtered_resps"] for row in samples[task]}
        assert sorted(answers) == [0, 1, 2]
        for row in rows:
            theirs, ours = answers[row["doc_id"]], row["filtered_resps"]
            if task == "generation":
                assert theirs == ours
            else:
                assert log_likelihoods(theirs) == pytest.approx(log_likelihoods(ours), rel=1e-5)
    for task, figures in one.items():
        for name, value in figures.items():
            if isinstance(value, float) and "stderr" not in name:  # which is drawn by lot, from answers in their order
                assert results[task][name] == pytest.approx(value, rel=1e-4)


def test_lm_eval_says_what_is_wrong(tmp_path, capfd):
    write_tasks(tmp_path)
    options = ["--tasks", str(tmp_path / "choices.yaml"), "--model", "megatron_tf"]
    assert lm_eval.main(["run", *options, "--model_args", "checkpoint=nowhere"]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "error: nowhere does not exist: there is no checkpoint to read"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": "few"}, "batch_size is 'few': give a number of sequences, or \"auto\""),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 0}, "max_length is 0: it must be 2 or more"),
    ],
)
def test_the_class_says_what_is_wrong(checkpoint, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        MegatronTF(str(checkpoint), **options)


def test_continuations_that_cannot_be_are_named(checkpoint):
    model = MegatronTF(str(checkpoint))
    with pytest.raises(UserError, match="no token for the continuation of"):
        model.loglikelihood([request("loglikelihood", "A dog", "")])
    with pytest.raises(UserError, match="max_gen_toks 16 leaves no room for a context in max_length 16"):
        model.generate_until([request("generate_until", "A dog", {"max_gen_toks": SEQ_LENGTH})])


def request(kind, *arguments):
    """One of lm-eval's."""
    return Instance(kind, {}, arguments, 0)


def test_an_empty_context_is_an_end_of_document(checkpoint, model):
    (found, _), (after, _) = MegatronTF(str(checkpoint)).loglikelihood(
        [request("loglikelihood", "", "wet"), request("loglikelihood", "w", "et")]
    )
    assert found == pytest.approx(log_likelihood(model, [EOD, *b"wet"], 1), abs=1e-4)
    assert after == pytest.approx(log_likelihood(model, list(b"wet"), 1), abs=1e-4)
