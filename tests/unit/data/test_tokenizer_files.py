"""Tokenizers map text to ids and do nothing else, and end documents with the token that their own files name."""

import base64
import json
import sys

import pytest

pytest.importorskip("tiktoken", reason="tiktoken is not installed")

import tiktoken
import tiktoken_ext.openai_public as published
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron_tf.config import ConfigError
from megatron_tf.data import tiktoken_reference
from megatron_tf.data.build import check_tokenizer
from megatron_tf.data.indexed_dataset import DataError, token_dtype
from megatron_tf.data.tokenizer import build_tokenizer
from tests.support.characters import each_kind_of_character
from tests.support.data import write_data_set
from tests.support.training import small_run


def byte_level(special=("<|endoftext|>",)):
    """A small byte-level BPE, which the fast engine knows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def words(tokens, special=()):
    """A tokenizer of words, which only the slow library knows."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def save(path, tokenizer, **changes):
    content = json.loads(tokenizer.to_str())
    model = changes.pop("model", {})
    path.write_text(json.dumps({**content, **changes, "model": {**content["model"], **model}}))
    return path


TRUNCATION = {"direction": "Right", "max_length": 1000, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": 8,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}
TEMPLATE = json.loads(
    processors.TemplateProcessing(single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    .__getstate__()
    .decode()
)
SETTINGS = [
    {"truncation": TRUNCATION},
    {"truncation": {**TRUNCATION, "max_length": 3, "direction": "Left"}},
    {"padding": PADDING},
    {"padding": {**PADDING, "strategy": "BatchLongest", "pad_to_multiple_of": None, "direction": "Left"}},
    {"post_processor": TEMPLATE},
    {"truncation": TRUNCATION, "padding": PADDING, "post_processor": TEMPLATE},
]


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_nothing_in_a_tokenizer_json_cuts_fills_or_surrounds_ids(tmp_path, kind, settings):
    plain = byte_level() if kind == "fast" else words(["w", "the", "a"], ["<|endoftext|>"])
    tokenizer = build_tokenizer("HFTokenizer", save(tmp_path / "tokenizer.json", plain, **settings))
    assert (tokenizer._engine is not None) == (kind == "fast")
    texts = ["the a", "", "the " * 5000, "a\u0c5c the " * 2000, "x"]  # with a character that goes the slow way
    expected = [plain.encode(text, add_special_tokens=False).ids for text in texts]
    assert [row.tolist() for row in tokenizer.encode_batch(texts).rows()] == expected


@pytest.mark.parametrize("text", ["the " * 3000, "the \u0c5c" * 3000])
def test_dropout_of_merges_does_not_act(tmp_path, text):
    path = save(tmp_path / "tokenizer.json", byte_level(), model={"dropout": 0.5})
    expected = byte_level().encode(text, add_special_tokens=False).ids
    for _ in range(2):
        assert build_tokenizer("HFTokenizer", path).encode_batch([text]).ids.tolist() == expected


def with_hole(path, highest):
    content = json.loads(words(["w", "the"], ["</s>"]).to_str())
    content["model"]["vocab"]["far"] = highest
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("highest, dtype", [(90, "uint16"), (65_498, "uint16"), (65_499, "int32"), (70_000, "int32")])
def test_types_and_rows_follow_from_the_highest_id(tmp_path, highest, dtype):
    tokenizer = build_tokenizer("HFTokenizer", with_hole(tmp_path / "tokenizer.json", highest))
    assert tokenizer.vocab_size == highest + 1
    assert token_dtype(tokenizer.vocab_size) == dtype
    assert int(tokenizer.encode_batch(["far"]).ids[0]) == highest
    config = small_run(data={"data_path": [str(write_data_set(tmp_path / "d", [[1]]))]}, model={"vocab_size": 4})
    with pytest.raises(ConfigError, match=rf"has {highest + 1} ids: set model.vocab_size to that"):
        check_tokenizer(config, tokenizer)


def test_without_holes_the_identity_is_the_one_that_old_checkpoints_have(tmp_path):
    path = save(tmp_path / "tokenizer.json", byte_level())
    count = byte_level().get_vocab_size(with_added_tokens=True)
    assert build_tokenizer("HFTokenizer", path).identity["vocab_size"] == count


GEMMA = ["<pad>", "<eos>", "<bos>", "a", "</s>", "<end_of_turn>"]


def test_an_entry_that_only_looks_like_the_end_is_not_taken(tmp_path):
    path = tmp_path / "tokenizer.json"
    words(GEMMA, ["<pad>", "<eos>", "<bos>", "<end_of_turn>"]).save(str(path))
    assert build_tokenizer("HFTokenizer", path).eod == 1
    assert build_tokenizer("HFTokenizer", path, eod_token="</s>").eod == 4


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", ["<end_of_turn>", {"content": "<end_of_turn>", "special": True}])
def test_the_end_is_the_one_that_the_files_next_to_it_name(tmp_path, name, token):
    path = tmp_path / "tokenizer.json"
    words(GEMMA, ["<eos>", "<end_of_turn>"]).save(str(path))
    (tmp_path / name).write_text(json.dumps({"eos_token": token}))
    assert build_tokenizer("HFTokenizer", path).eod == 5
    assert build_tokenizer("HFTokenizer", path, eod_token="<eos>").eod == 1


def test_a_tokenizer_without_a_known_end_serves_until_one_is_needed(tmp_path):
    path = tmp_path / "tokenizer.json"
    words(["a", "b", "<｜end▁of▁sentence｜>"], ["<｜end▁of▁sentence｜>"]).save(str(path))
    tokenizer = build_tokenizer("HFTokenizer", path)
    assert tokenizer.encode_batch(["a b"]).ids.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"--eod-token.*<｜end▁of▁sentence｜>"):
        _ = tokenizer.eod
    assert build_tokenizer("HFTokenizer", path, eod_token="<｜end▁of▁sentence｜>").eod == 2
    with pytest.raises(DataError, match="has no token '<none>'"):
        _ = build_tokenizer("HFTokenizer", path, eod_token="<none>").eod


def test_a_run_ends_documents_as_its_data_does(tmp_path):
    path = tmp_path / "tokenizer.json"
    words(GEMMA, ["<eos>", "<end_of_turn>"]).save(str(path))
    prefix = write_data_set(tmp_path / "d", [[3, 1], [3, 3, 1]])
    tokenizer = build_tokenizer("HFTokenizer", path, eod_token="<end_of_turn>")
    model = {"vocab_size": tokenizer.vocab_size}
    report = {"tokenizer": tokenizer.identity, "eod": 1}
    (tmp_path / "d.json").write_text(json.dumps(report))
    with pytest.raises(DataError, match=r"documents end with id 1, but the configured tokenizer's end is 5"):
        check_tokenizer(small_run(data={"data_path": [str(prefix)]}, model=model), tokenizer)
    (tmp_path / "d.json").unlink()
    for key in ("eod_mask_loss", "reset_attention_mask"):
        config = small_run(data={"data_path": [str(prefix)], key: True}, model=model)
        with pytest.raises(DataError, match=r"the end-of-document id 5, the first ends with 1"):
            check_tokenizer(config, tokenizer)
        check_tokenizer(config, build_tokenizer("HFTokenizer", path))


def write_ranks(path):
    ranks = {bytes([i]): i for i in range(256)}
    for merged in (b"'s", b"_a", b"ab", b"b'", b" a", b"aB"):
        ranks[merged] = len(ranks)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return ranks


def reference_of(name, ranks, monkeypatch):
    monkeypatch.setattr(published, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr(published, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks)
    described = getattr(published, name)()
    assert tiktoken_reference.PATTERNS[name] == described["pat_str"]
    assert tiktoken_reference.SPECIAL_TOKENS[name] == described["special_tokens"]
    described.pop("explicit_n_vocab", None)
    return tiktoken.Encoding(**described)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_ids_of_each_kind_of_character_are_those_of_tiktoken(tmp_path, monkeypatch, name):
    ranks = write_ranks(tmp_path / f"{name}.tiktoken")
    tokenizer = build_tokenizer("TikTokenizer", tmp_path / f"{name}.tiktoken")
    reference = reference_of(name, ranks, monkeypatch)
    texts = [f"{c}'s{c}_ab{c}b's aB{c} a1{c}" for c in each_kind_of_character()]
    expected = reference.encode_ordinary_batch(texts)
    differing = [
        text
        for text, row, ids in zip(texts, tokenizer.encode_batch(texts).rows(), expected, strict=True)
        if row.tolist() != ids
    ]
    assert not differing
    assert tokenizer.vocab_size == reference.n_vocab


def test_a_missing_tiktoken_is_said_once(tmp_path, monkeypatch, caplog):
    write_ranks(tmp_path / "cl100k_base.tiktoken")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = build_tokenizer("TikTokenizer", tmp_path / "cl100k_base.tiktoken")
    for _ in range(2):
        assert len(tokenizer.encode_batch(["a", "\u0c5c's"]).lengths) == 2
    assert [record.message for record in caplog.records if "pip install tiktoken" in record.message]
    assert len(caplog.records) == 1


def test_ranks_of_another_name_and_other_names_of_tokenizers(tmp_path):
    write_ranks(tmp_path / "qwen.tiktoken")
    with pytest.raises(DataError, match=r"name of its encoding \(r50k_base\.tiktoken.*HFTokenizer"):
        build_tokenizer("TikTokenizer", tmp_path / "qwen.tiktoken")
    for name, hint in [
        ("GPT2BPETokenizer", "did you mean HFTokenizer, with"),
        ("Llama2Tokenizer", "did you mean SentencePieceTokenizer, with"),
        ("NulTokenizer", "did you mean NullTokenizer"),
        ("Mistral", "known are HFTokenizer"),
    ]:
        with pytest.raises(DataError, match=hint):
            build_tokenizer(name, tmp_path / "qwen.tiktoken")
