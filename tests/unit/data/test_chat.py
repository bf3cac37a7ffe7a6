"""Conversations in a chat template, with the loss on answers: against transformers, and by their text."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_tf.commands import inspect_dataset, merge_datasets, preprocess_data
from megatron_tf.config import ConfigError
from megatron_tf.data import documents, preprocess
from megatron_tf.data.chat_files import CHATML, read_chat_template
from megatron_tf.data.chat_ids import encode_conversations
from megatron_tf.data.chat_template import ChatTemplate, Conversation
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.loss_mask import check_loss_mask, open_loss_mask
from megatron_tf.data.messages import BadRowError
from megatron_tf.data.tokenizer import HFTokenizer, build_tokenizer
from tests.support.chat import MARKED, TALK, UNMARKED, write_chat_tokenizer, write_talks

QUESTION = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "It is four."}
TALKS = [TALK, [QUESTION, ANSWER], [QUESTION, {**ANSWER, "content": ""}], [*TALK, QUESTION]]


@pytest.fixture
def tokenizer_path(tmp_path):
    return write_chat_tokenizer(tmp_path / "tokenizer")


def prepare(path, tokenizer, *options):
    """Run the command on a file; return (exit code, prefix of the dataset)."""
    prefix = path.parent / "out" / "chat"
    tokenizer_options = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(tokenizer), "--workers", "1"]
    arguments = ["--sft", "--input", str(path), "--output-prefix", str(prefix), "--append-eod", *tokenizer_options]
    return preprocess_data.main([*arguments, *options]), f"{prefix}_messages_document"


def read(prefix, tokenizer_path):
    """[(ids, mask, text of the targets)] of each conversation."""
    dataset, tokenizer = IndexedDataset(prefix), build_tokenizer("HFTokenizer", tokenizer_path)
    mask = open_loss_mask(dataset, by_sequence=False)
    rows = [(dataset.document(i).tolist(), mask.document(i).tolist()) for i in range(len(dataset))]
    return [(*row, tokenizer.decode([i for i, m in zip(*row, strict=True) if m])) for row in rows]


def test_ids_and_masks_are_those_of_transformers(tmp_path, tokenizer_path):
    transformers = pytest.importorskip("transformers")
    code, prefix = prepare(write_talks(tmp_path / "talks.jsonl", TALKS), tokenizer_path)
    assert code == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_path.parent)
    for talk, (ids, mask, _) in zip(TALKS, read(prefix, tokenizer_path), strict=True):
        expected = theirs.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
        assert ids == [*expected["input_ids"], theirs.eos_token_id]
        assert mask == [*expected["assistant_masks"], talk[-1]["role"] == "assistant"]


@pytest.mark.parametrize("template", [MARKED, UNMARKED, CHATML], ids=["marked", "unmarked", "built in"])
def test_the_targets_are_the_answers_and_what_ends_them(tmp_path, template):
    end = "<|im_end|>" if template == MARKED else "<|im_end|>\n"
    tokenizer_path = write_chat_tokenizer(tmp_path / "tokenizer", None if template == CHATML else template)
    options = ["--chat-template", CHATML] if template == CHATML else []
    code, prefix = prepare(write_talks(tmp_path / "talks.jsonl", TALKS), tokenizer_path, *options)
    assert code == 0
    expected = [f"Eight, of course.{end}Two — mostly.{end}", f"It is four.{end}", end]
    stop = "<|endoftext|>"
    assert [text for *_, text in read(prefix, tokenizer_path)] == [*(text + stop for text in expected), expected[0]]


def test_the_built_in_template_is_chatml(tokenizer_path):
    template = read_chat_template(tokenizer_path, CHATML)
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in TALK]
    found = template.conversation(TALK)
    assert found.text == "".join(turns)
    assert [found.text[a:b] for a, b in found.answers] == ["Eight, of course.<|im_end|>\n", "Two — mostly.<|im_end|>\n"]


def test_share_gpt_is_read_as_the_messages_that_it_means(tmp_path, tokenizer_path):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    theirs = [[{"from": names[m["role"]], "value": m["content"]} for m in talk] for talk in TALKS]
    plain = prepare(write_talks(tmp_path / "a" / "t.jsonl", TALKS), tokenizer_path)[1]
    path = write_talks(tmp_path / "b" / "t.jsonl", theirs, key="conversations")
    code, prefix = prepare(path, tokenizer_path, "--json-keys", "conversations")
    assert code == 0
    prefix = prefix.replace("_messages_", "_conversations_")
    assert read(prefix, tokenizer_path) == read(plain, tokenizer_path)


def test_tables_give_the_bytes_of_lines(tmp_path, tokenizer_path):
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"id": 1, "messages": talk} for talk in TALKS])
    parquet = pytest.importorskip("pyarrow.parquet")
    plain = prepare(write_talks(tmp_path / "a" / "t.jsonl", TALKS), tokenizer_path)[1]
    (tmp_path / "b").mkdir()
    parquet.write_table(table, tmp_path / "b" / "t.parquet")
    code, prefix = prepare(tmp_path / "b" / "t.parquet", tokenizer_path)
    assert code == 0
    assert read(prefix, tokenizer_path) == read(plain, tokenizer_path)


def test_a_table_without_a_list_is_refused(tmp_path, tokenizer_path, capsys):
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"messages": "text"}])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "t.parquet")
    assert prepare(tmp_path / "t.parquet", tokenizer_path)[0] == 1
    assert "column 'messages' is string, not a list of messages" in capsys.readouterr().err


BAD = {
    '{"messages": "text"}': "'messages': not a list of messages",
    '{"messages": []}': "'messages': not a list of messages",
    '{"messages": ["hello"]}': "'messages': a message is not an object",
    '{"messages": [{"content": "x"}]}': "'messages': a message without a text as its role",
    '{"messages": [{"role": "assistant", "content": null}]}': "'messages': a message without a text as its content",
    '{"messages": [{"role": "user", "content": "x"}]}': "'messages': no message of the assistant",
    '{"messages": [{"role": "assistant", "content": "\\ud800"}]}': "'messages' has a lone surrogate",
    '{"text": "x"}': "no key 'messages'",
    '{"messages"': "malformed JSON",
}


def test_bad_rows_are_counted_by_kind_with_the_first_line(tmp_path, tokenizer_path, capsys):
    path = write_talks(tmp_path / "talks.jsonl", [TALK, *BAD, TALK])
    code, prefix = prepare(path, tokenizer_path, "--max-bad-lines", "0.9")
    assert code == 0
    assert len(IndexedDataset(prefix)) == 2
    report = json.loads((tmp_path / "out" / "chat.json").read_text())
    kinds = list(dict.fromkeys(BAD.values()))
    firsts = {kind: f"{path}:{2 + list(BAD.values()).index(kind)}" for kind in kinds}
    assert {kind: bad["first"] for kind, bad in report["bad_lines"].items()} == firsts
    assert sum(bad["count"] for bad in report["bad_lines"].values()) == len(BAD)
    targets = sum(sum(mask) for _, mask, _ in read(prefix, tokenizer_path))
    assert f"{targets} of them in answers" in capsys.readouterr().out
    assert prepare(path, tokenizer_path, "--json-keys", "other")[0] == 1


def test_a_template_that_refuses_or_fails_makes_a_bad_row():
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRowError, match="the chat template refuses it: roles must alternate"):
        refusing.conversation(TALK)
    for escape in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[99].content }}"):
        with pytest.raises(BadRowError, match=r"the chat template fails with (Security|Undefined)Error"):
            ChatTemplate(escape).conversation(TALK)


def test_a_template_may_use_what_those_of_hugging_face_use():
    template = ChatTemplate(
        "{%- for m in messages if m.role == 'assistant' %}{{ bos_token }}{% generation %}{{ m.content | tojson }}"
        "{% endgeneration %}{% break %}{% endfor %}{{ strftime_now is defined }}",
        (("bos_token", "<s>"),),
    )
    found = template.conversation(TALK)
    assert found.text == '<s>"Eight, of course."False'
    assert found.answers == [(3, 22)]


def test_a_template_that_changes_earlier_text_is_an_error_that_names_the_line(tmp_path, capsys):
    """It ends with a token after the last message only."""
    tokenizer_path = write_chat_tokenizer(
        tmp_path / "tokenizer", UNMARKED + "{{ eos_token if not add_generation_prompt }}"
    )
    path = write_talks(tmp_path / "talks.jsonl", [[QUESTION, ANSWER], TALK])
    assert prepare(path, tokenizer_path)[0] == 1
    error = capsys.readouterr().err
    assert f"{path}:2: the chat template renders message 3 differently" in error
    assert "put {% generation %} and {% endgeneration %} around them" in error


def test_an_end_that_the_template_writes_is_not_doubled(tmp_path):
    tokenizer_path = write_chat_tokenizer(tmp_path / "tokenizer", MARKED + "{{ eos_token }}")
    _, prefix = prepare(write_talks(tmp_path / "talks.jsonl", [TALK]), tokenizer_path)
    ids, mask, _ = read(prefix, tokenizer_path)[0]
    assert (ids.count(0), ids[-1], mask[-1]) == (1, 0, 0)


def test_templates_are_found_where_tokenizers_keep_them(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    path = write_chat_tokenizer(tmp_path / "t", named, bos_token={"content": "<s>"})
    found = read_chat_template(path, None)
    assert found == ChatTemplate("yes", (("bos_token", "<s>"), ("eos_token", "<|endoftext|>")))
    (path.parent / "chat_template.jinja").write_text("file")
    assert read_chat_template(path, None).text == "file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert read_chat_template(path, str(tmp_path / "mine.jinja")).text == "mine"


def test_templates_that_are_missing_or_malformed_are_named(tmp_path):
    path = write_chat_tokenizer(tmp_path / "t", None)
    with pytest.raises(DataError, match=r"has no chat template, .* give one as --chat-template FILE, or .* chatml"):
        read_chat_template(path, None)
    with pytest.raises(DataError, match="there is no file nowhere"):
        read_chat_template(path, "nowhere")
    (path.parent / "chat_template.jinja").write_text("a\n{% if %}")
    with pytest.raises(DataError, match=r"chat_template.jinja: the chat template is malformed in line 2"):
        read_chat_template(path, None)


def test_a_resumed_command_writes_the_same_bytes(tmp_path, tokenizer_path, monkeypatch):
    path = write_talks(tmp_path / "talks.jsonl", TALKS * 20)
    prepare(path, tokenizer_path)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(documents, "BATCH_BYTES", 2000)
    monkeypatch.setattr(preprocess, "COMMIT_BYTES", 3000)
    encode, calls = HFTokenizer.encode_with_offsets, []

    def failing(self, texts):
        calls.append(len(texts))
        if len(calls) == 4:
            raise DataError("stopped here")
        return encode(self, texts)

    monkeypatch.setattr(HFTokenizer, "encode_with_offsets", failing)
    assert prepare(path, tokenizer_path)[0] == 1
    assert prepare(path, tokenizer_path)[0] == 0
    assert sum(calls) < 2 * len(TALKS * 20)  # what was committed was not read again
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == whole
    assert prepare(path, tokenizer_path)[0] == 0  # complete already


def test_inspection_shows_the_targets(tmp_path, tokenizer_path, capsys):
    _, prefix = prepare(write_talks(tmp_path / "talks.jsonl", [TALK]), tokenizer_path)
    capsys.readouterr()
    ids, mask, _ = read(prefix, tokenizer_path)[0]
    asked = [prefix, "--documents", "0", "--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(tokenizer_path)]
    assert inspect_dataset.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(f"  targets: {sum(mask)} of {len(ids)} "))
    spans = [tuple(map(int, span.split("-"))) for span in lines[at].split(" at ")[1].split(", ")]
    assert [i for start, stop in spans for i in range(start, stop + 1)] == np.flatnonzero(mask).tolist()
    assert [ast.literal_eval(line.strip()) for line in lines[at + 1 :]] == [
        "Eight, of course.<|im_end|>",
        "Two — mostly.<|im_end|>",
        "<|endoftext|>",
    ]


def test_merging_keeps_the_targets_of_each_conversation(tmp_path, tokenizer_path, capsys):
    parts = {"a": TALKS[:1], "b": TALKS[1:]}
    paths = [write_talks(tmp_path / name / "talks.jsonl", talks) for name, talks in parts.items()]
    prefixes = [prepare(path, tokenizer_path)[1] for path in paths]
    assert merge_datasets.main(["--input", *prefixes, "--output-prefix", str(tmp_path / "merged")]) == 0
    merged = read(str(tmp_path / "merged"), tokenizer_path)
    assert merged == [row for prefix in prefixes for row in read(prefix, tokenizer_path)]
    assert len(merged) == len(TALKS)
    for suffix in (".bin", ".idx"):
        Path(f"{prefixes[1]}_loss_mask{suffix}").unlink()
    Path(f"{prefixes[1]}.json").unlink(missing_ok=True)
    assert merge_datasets.main(["--input", *prefixes, "--output-prefix", str(tmp_path / "mixed")]) == 1
    assert f"{prefixes[0]} has a loss mask, {prefixes[1]} has none" in capsys.readouterr().err
    assert not list(tmp_path.glob("mixed*"))


def test_a_mask_of_other_documents_or_none_is_refused(tmp_path, tokenizer_path):
    _, prefix = prepare(write_talks(tmp_path / "a" / "t.jsonl", TALKS), tokenizer_path)
    _, other = prepare(write_talks(tmp_path / "b" / "t.jsonl", TALKS[:2]), tokenizer_path)
    dataset = IndexedDataset(prefix)
    for kind in ("idx", "bin"):
        shutil.copy(f"{other}_loss_mask.{kind}", f"{prefix}_loss_mask.{kind}")
    with pytest.raises(DataError, match="is not the loss mask of"):
        open_loss_mask(dataset, by_sequence=False)
    (tmp_path / "a" / "out" / "chat_messages_document_loss_mask.idx").unlink()
    with pytest.raises(DataError, match=r"loss_mask.idx is missing"):
        open_loss_mask(dataset, by_sequence=False)


def test_a_run_decides_about_the_loss_mask(tmp_path, tokenizer_path):
    _, chat = prepare(write_talks(tmp_path / "t.jsonl", TALKS), tokenizer_path)
    with pytest.raises(ConfigError, match="holds conversations: set it to true to train on the answers only"):
        check_loss_mask(None, [chat])
    with pytest.raises(ConfigError, match="no dataset has a loss mask: preprocess conversations with --sft"):
        check_loss_mask(True, [str(tmp_path / "text")])
    check_loss_mask(True, [chat, str(tmp_path / "text")])
    check_loss_mask(False, [chat])
    check_loss_mask(None, [str(tmp_path / "text")])


def test_other_tokenizers_are_refused(tmp_path, capsys):
    path = write_talks(tmp_path / "t.jsonl", TALKS)
    arguments = ["--sft", "--input", str(path), "--output-prefix", str(tmp_path / "o"), "--tokenizer-type"]
    assert preprocess_data.main([*arguments, "NullTokenizer"]) == 1
    assert "--sft needs --tokenizer-type HFTokenizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        preprocess_data.main([*arguments[1:], "NullTokenizer", "--chat-template", CHATML])


def test_a_token_counts_if_any_of_its_characters_is_of_an_answer(tokenizer_path):
    tokenizer = build_tokenizer("HFTokenizer", tokenizer_path)
    text = "You are brief. 🐦 héron"
    ids, offsets = tokenizer.encode_with_offsets([text])[0]
    assert ids.tolist() == tokenizer.encode_batch([text]).ids.tolist()
    longest = int(np.argmax(offsets[:, 1] - offsets[:, 0]))
    start, stop = offsets[longest].tolist()
    assert stop - start > 1
    for answer in ((start, start + 1), (stop - 1, stop), (start, stop)):
        _, mask = encode_conversations([Conversation(text, [answer], False)], tokenizer, None)
        assert np.flatnonzero(mask.ids).tolist() == [longest]
    bird = text.index("🐦")
    encoded, mask = encode_conversations([Conversation(text, [(bird, bird + 1)], False)], tokenizer, None)
    assert tokenizer.decode(encoded.ids[mask.ids == 1].tolist()).strip() == "🐦"  # all tokens of its bytes
