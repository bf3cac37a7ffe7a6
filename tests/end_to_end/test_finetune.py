"""Fine-tuning a grown model on conversations: preprocess --sft, grow, train on the answers, on one rank and on two."""

import json

import numpy as np
import pytest
import yaml

from megatron_tf import pretrain
from megatron_tf.commands import preprocess_data, reshard_checkpoint
from megatron_tf.config.load import to_dict
from tests.support.chat import write_chat_tokenizer, write_talks
from tests.support.commands import run
from tests.support.data import write_data_set
from tests.support.training import small_run

VOCAB = 309  # of the tokenizer
STEPS = 40


def talks():
    """Random questions, and always the same answer."""
    generator = np.random.default_rng(1)
    for _ in range(120):
        question = "".join(generator.choice(list("abcdefgh"), int(generator.integers(2, 9))))
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": "It is four."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Conversations, and a model that was trained for two steps on random text and grown."""
    folder = tmp_path_factory.mktemp("finetune")
    tokenizer = write_chat_tokenizer(folder / "tokenizer")
    path = write_talks(folder / "talks.jsonl", talks())
    options = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(tokenizer), "--workers", "1"]
    command = ["--sft", "--input", str(path), "--output-prefix", str(folder / "chat"), "--append-eod", *options]
    assert preprocess_data.main(command) == 0
    generator = np.random.default_rng(2)
    write_data_set(folder / "text", [[*generator.integers(1, VOCAB, 40), 0] for _ in range(50)])
    training = {"train_iters": 2, "seq_length": 32}
    data = {"data_path": [str(folder / "text")]}
    assert pretrain.main([str(configure(folder, "base", training=training, data=data))]) == 0
    grow = ["--load", str(folder / "base"), "--save", str(folder / "grown"), "--grow", "ffn=96,qkv=48"]
    assert reshard_checkpoint.main(grow) == 0
    return folder


def configure(folder, name, **sections):
    """Write the configuration of a run that saves to `name`; return its path."""
    values = to_dict(small_run(model={"vocab_size": VOCAB}))
    values["data"] |= {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(folder / "tokenizer/tokenizer.json")}
    values["data"] |= {"split": "1,0,0", "order": "counter"}
    values["checkpoint"]["save"] = str(folder / name)
    values["logging"] |= {"metrics_file": str(folder / f"{name}.jsonl"), "log_interval": 1}
    values["training"]["eval_interval"] = 0
    for section, keys in sections.items():
        values[section] |= keys
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def fine_tuning(folder, name, **data):
    """The configuration of a run that trains the grown model on the conversations."""
    training = {"train_iters": STEPS, "seq_length": 32, "global_batch_size": 8, "micro_batch_size": 2}
    data = {"data_path": [str(folder / "chat_messages_document")], "loss_mask": True, **data}
    checkpoint = {"save": str(folder / name), "load": str(folder / "grown"), "finetune": True}
    model = {"ffn_tokens": 96, "qkv_tokens": 48}
    optimizer = {"lr": 8e-3, "lr_decay_style": "constant"}
    return configure(
        folder, name, training=training, data=data, checkpoint=checkpoint, model=model, optimizer=optimizer
    )


def losses(folder, name):
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(("packing", "order"), [("concatenate", "lanes"), ("best_fit", "counter")])
def test_the_loss_on_answers_falls(folder, packing, order, capsys):
    path = fine_tuning(folder, packing, packing=packing, order=order, reset_attention_mask=True)
    assert pretrain.main([str(path)]) == 0
    curve = losses(folder, packing)
    assert curve[0] > 5
    assert curve[-1] < 0.6
    said = capsys.readouterr().out
    assert ("packing: chat_messages_document:train: 120 documents in" in said) == (packing == "best_fit")


AXES = {
    "data": [],
    "tensor": ["--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true"],
    "pipeline": ["--parallel.pipeline_model_parallel_size=2"],
    "context": ["--parallel.context_parallel_size=2"],
}


@pytest.mark.parametrize("axis", AXES)
def test_two_ranks_train_as_one_does(folder, axis):
    curves = []
    for ranks, more in ((1, []), (2, AXES[axis])):
        path = fine_tuning(folder, f"{axis}-{ranks}", packing="best_fit", reset_attention_mask=True)
        done = run("megatron_tf.pretrain", path, "--training.train_iters=10", *more, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        curves.append(losses(folder, path.stem))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert len(curves[0]) == 10


def write_rows(folder, last):
    """Write conversations that fill a row each; all but the first end with `last`, which only is a masked target."""
    folder.mkdir()
    generator = np.random.default_rng(3)
    rows = [generator.integers(1, VOCAB, 32) for _ in range(64)]
    for number, row in enumerate(rows):
        row[-1] = last if number else 0
    write_data_set(folder / "rows", [row.tolist() for row in rows])
    write_data_set(folder / "rows_loss_mask", [[1] * 31 + [0]] * len(rows), np.uint8)
    return str(folder / "rows")


def test_the_ids_of_masked_targets_change_nothing(folder):
    prefixes = {last: write_rows(folder / f"last{last}", last) for last in (7, 9)}
    curves = {}
    for last, prefix in prefixes.items():
        for mask in (True, False):
            name = f"last{last}-{mask}"
            path = fine_tuning(folder, name, data_path=[prefix], loss_mask=mask, packing="best_fit")
            assert pretrain.main([str(path), "--training.train_iters=6"]) == 0
            curves[last, mask] = losses(folder, name)
    assert curves[7, True] == curves[9, True]
    assert curves[7, False] != curves[9, False]


def test_a_resume_with_other_targets_ends_with_one_line(folder, capsys):
    prefix = write_rows(folder / "relabeled", 7)
    path = fine_tuning(folder, "labels", data_path=[prefix], loss_mask=True, packing="best_fit")
    options = [str(path), "--training.train_iters=2"]
    assert pretrain.main(options) == 0
    write_data_set(folder / "relabeled" / "rows_loss_mask", [[0, *[1] * 30, 0]] * 64, np.uint8)
    capsys.readouterr()
    assert pretrain.main(options) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "the files of rows changed, the same tokens, but other targets in the loss" in error
    assert "checkpoint.allow_changes: [data.content]" in error
