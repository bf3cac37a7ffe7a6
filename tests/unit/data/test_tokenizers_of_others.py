"""Tokenizer files as people have them: GPT-2's vocab.json and merges.txt, tekken.json, tiktoken files of any name.

Each against its reference library, over all characters and real text.
"""

import base64
import json
import shutil
import sys

import pytest
from backports import zstd

pytest.importorskip("tiktoken", reason="tiktoken is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import tiktoken
from tiktoken_ext.openai_public import cl100k_base, r50k_pat_str
from transformers import GPT2Tokenizer

from megatron_tf import generate
from megatron_tf.data import tiktoken_files
from megatron_tf.data.bpe_engine import PROBES
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.tokenizer import build_tokenizer
from tests.support.characters import each_kind_of_character
from tests.support.conversion import convert, save_small_model
from tests.support.paths import EXAMPLES

END = "<|endoftext|>"
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
MERGED = [b"th", b"the", b" the", b"in", b"ing", b"  ", b"'s", b"_a", b"ab", b"b'", b" a", b"aB", b"\xe3\x81"]


def real_texts():
    with zstd.open(EXAMPLES / "data" / "pile_sample_heldout.jsonl.zst") as file:
        return [*PROBES, *(line.decode()[:5000] for line in file)]


def assert_same(tokenizer, encode):
    """On real text, and on all kinds of characters."""
    for texts in (real_texts(), [f"{c}'s{c}_ab{c}b's aB{c} a1{c}" for c in each_kind_of_character()]):
        rows = [row.tolist() for row in tokenizer.encode_batch(texts).rows()]
        assert [text for text, row, ids in zip(texts, rows, encode(texts), strict=True) if row != ids] == []


def ranks_of_bytes():
    ranks = {bytes([i]): i for i in range(256)}
    return ranks | {token: 256 + i for i, token in enumerate(MERGED)}


def write_ranks(path):
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks_of_bytes().items())
    path.write_bytes(b"".join(lines))
    return path


def write_pair(folder, vocabulary="vocab.json", merges="merges.txt", count=0):
    """A small byte-level BPE, filled up to `count` tokens; returns the vocabulary's path."""
    from tokenizers.pre_tokenizers import ByteLevel

    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g"), ("Ġ", "Ġ"), ("'", "s"), ("a", "B")]
    tokens = [*sorted(ByteLevel.alphabet()), *map("".join, pairs), END]
    tokens += [f"unused{i}" for i in range(count - len(tokens))]
    (folder / vocabulary).write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / merges).write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    return folder / vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "gpt2-"])
def test_a_vocabulary_with_its_merges_gives_the_ids_of_transformers(tmp_path, prefix):
    path = write_pair(tmp_path, f"{prefix}vocab.json", f"{prefix}merges.txt")
    reference = GPT2Tokenizer(vocab=str(path), merges=str(tmp_path / f"{prefix}merges.txt"))
    tokenizer = build_tokenizer("HFTokenizer", path)
    assert_same(tokenizer, lambda texts: reference(texts)["input_ids"])
    assert tokenizer.eod == reference.eos_token_id
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.decode(tokenizer.encode_batch([" the thing's"]).ids.tolist()) == " the thing's"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: (d / "merges.txt").unlink(), r"merges\.txt is missing: put it next to the vocabulary"),
        (lambda d: (d / "merges.txt").write_text("#version\nt h\nx yz\n"), r"merges\.txt:3: 'x yz' is not a merge"),
        (lambda d: (d / "merges.txt").write_bytes(b"\xff\xfe"), r"vocab\.json is not a HFTokenizer file.*utf-8"),
        (lambda d: (d / "vocab.json").write_text("[1]"), r"vocab\.json is not a vocabulary"),
        (lambda d: (d / "vocab.json").write_text('{"a": 0, "b": 0}'), "a unique id"),
        (lambda d: (d / "vocab.json").write_text('{"a": -1}'), "a unique id"),
        (lambda d: (d / "vocab.json").write_text("{"), r"vocab\.json is not a HFTokenizer file"),
        (lambda d: (d / "added_tokens.json").write_text("{}"), r"added_tokens\.json adds tokens"),
        (
            lambda d: (d / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}'),
            r"belongs to a Qwen2Tokenizer, which may split text differently from GPT-2: use the tokenizer\.json",
        ),
    ],
)
def test_a_pair_that_is_not_gpt2s_ends_with_one_line(tmp_path, spoil, message):
    path = write_pair(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        build_tokenizer("HFTokenizer", path)
    assert "\n" not in str(caught.value)


def test_a_pair_is_another_tokenizer_where_only_its_merges_are_others(tmp_path):
    path = write_pair(tmp_path)
    before = build_tokenizer("HFTokenizer", path).identity
    text = (tmp_path / "merges.txt").read_text()
    (tmp_path / "merges.txt").write_text(text.replace("i n\nin g\n", ""))
    after = build_tokenizer("HFTokenizer", path).identity
    assert before["vocab_size"] == after["vocab_size"]
    assert before["sha256"] != after["sha256"]


def test_a_whole_tokenizer_of_a_vocabularys_name_is_still_one_file(tmp_path):
    path = write_pair(tmp_path)
    whole = json.loads(build_tokenizer("HFTokenizer", path)._reference.to_str())
    other = tmp_path / "my-vocab.json"
    other.write_text(json.dumps(whole))
    texts = real_texts()
    expected = build_tokenizer("HFTokenizer", path).encode_batch(texts).ids.tolist()
    assert build_tokenizer("HFTokenizer", other).encode_batch(texts).ids.tolist() == expected


def test_a_pair_and_what_names_its_end_travel_with_the_checkpoint_and_the_export(tmp_path, monkeypatch, capsys):
    """From another directory, without the files of the run."""
    (tmp_path / "files").mkdir()
    path = write_pair(tmp_path / "files", count=280)
    (tmp_path / "files" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "unused5"}))
    checkpoint = save_small_model(tmp_path, tokenizer=("HFTokenizer", path), vocab_size=280)
    shutil.rmtree(tmp_path / "files")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert generate.main([str(checkpoint), "--prompt", "the", "--max-new-tokens", "2", "--temperature", "0"]) == 0
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "hf", "--skip-check") == 0
    names = {each.name for each in (tmp_path / "hf").iterdir()}
    assert {"tokenizer.json", "vocab.json", "merges.txt"} <= names
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 270
    assert convert("hf", "megatron_tf", tmp_path / "hf", tmp_path / "back") == 0, capsys.readouterr().err


def write_tekken(path, **changes):
    """A small tekken.json with two more entries than its vocabulary takes, as the published ones have."""
    tokens = [*ranks_of_bytes(), b"never", b"ever"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)]
    count = 30
    config = {
        "pattern": TEKKEN_PATTERN,
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": len(tokens) - 2 + count,
        "default_num_special_tokens": count,
        "version": "v3",
    }
    path.write_text(json.dumps({"config": config | changes.pop("config", {}), "vocab": vocab, **changes}))
    return path


@pytest.mark.slow
def test_a_tekken_file_gives_the_ids_of_tiktoken_behind_the_special_tokens(tmp_path):
    """mistral-common encodes so: tiktoken with the file's pattern and ranks, and as many ids further."""
    tokenizer = build_tokenizer("TikTokenizer", write_tekken(tmp_path / "tekken.json"))
    encoding = tiktoken.Encoding("tekken", pat_str=TEKKEN_PATTERN, mergeable_ranks=ranks_of_bytes(), special_tokens={})
    assert_same(tokenizer, lambda texts: [[i + 30 for i in ids] for ids in encoding.encode_ordinary_batch(texts)])
    assert tokenizer.encode_batch(["</s>"]).ids.tolist() == [i + 30 for i in encoding.encode_ordinary("</s>")]
    assert tokenizer.vocab_size == 30 + len(ranks_of_bytes())
    assert (tokenizer.eod, tokenizer.decode([2, 1, 19, 25])) == (2, "</s><s>[TOOL_CONTENT]<SPECIAL_25>")
    named = [{"rank": 0, "token_str": "<a>"}, {"rank": 3, "token_str": "</s>"}]
    other = build_tokenizer("TikTokenizer", write_tekken(tmp_path / "t.json", special_tokens=named))
    assert (other.eod, other.decode([0, 1])) == (3, "<a><SPECIAL_1>")
    assert build_tokenizer("TikTokenizer", tmp_path / "t.json", eod_token="<a>").eod == 0


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", r"t\.json is not a tekken\.json: KeyError"),
        ("[1]", r"t\.json is not a tekken\.json"),
        ("{", r"t\.json is not a TikTokenizer file"),
        ({"config": {"version": "v13"}}, "version 'v13' but lists no special tokens"),
        ({"config": {"default_vocab_size": 100}}, "has no token for byte 70"),
        ({"config": {"pattern": "("}}, r"t\.json is not a TikTokenizer file"),
        ({"special_tokens": [{"rank": 99, "token_str": "<a>"}]}, "special tokens have gaps"),
        ({"vocab": [{"rank": 5, "token_bytes": "AA=="}]}, "have gaps"),
        ({"vocab": [{"rank": 0, "token_bytes": "\u00e9"}]}, r"is not a tekken\.json"),
    ],
)
def test_a_bad_tekken_file_ends_with_one_line(tmp_path, content, message):
    path = tmp_path / "t.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        write_tekken(path, **content)
    with pytest.raises(DataError, match=message) as caught:
        build_tokenizer("TikTokenizer", path)
    assert "\n" not in str(caught.value)


def describe(path, **content):
    path.with_name(f"{path.name.removesuffix('.tiktoken')}.tiktoken.json").write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen.tiktoken", "tokenizer.model", "ranks"])
def test_ranks_of_any_name_are_cut_as_the_description_next_to_them_says(tmp_path, name):
    path = write_ranks(tmp_path / name)
    special = {"<|end|>": 300, END: 301}
    describe(path, pattern=TEKKEN_PATTERN, special_tokens=special)
    encoding = tiktoken.Encoding(
        "ranks", pat_str=TEKKEN_PATTERN, mergeable_ranks=ranks_of_bytes(), special_tokens=special
    )
    tokenizer = build_tokenizer("TikTokenizer", path)
    assert_same(tokenizer, lambda texts: [encoding.encode(text, allowed_special="all") for text in texts])
    assert (tokenizer.eod, tokenizer.vocab_size) == (301, encoding.n_vocab)
    assert build_tokenizer("TikTokenizer", path, eod_token="<|end|>").eod == 300
    with pytest.raises(DataError, match=r"has no special token '<none>'.*<\|end\|>"):
        _ = build_tokenizer("TikTokenizer", path, eod_token="<none>").eod
    before = tokenizer.identity
    describe(path, pattern=r50k_pat_str, special_tokens=special)
    assert build_tokenizer("TikTokenizer", path).identity != before


def test_the_name_of_a_published_encoding_is_a_description(tmp_path):
    path = write_ranks(tmp_path / "ours.tiktoken")
    describe(path, encoding="cl100k_base")
    (tmp_path / "by_name").mkdir()
    by_name = build_tokenizer("TikTokenizer", write_ranks(tmp_path / "by_name" / "cl100k_base.tiktoken"))
    texts = [*real_texts(), "a\u0c5c's", END]
    ours = build_tokenizer("TikTokenizer", path)
    assert ours.encode_batch(texts).ids.tolist() == by_name.encode_batch(texts).ids.tolist()
    assert (ours.eod, ours.vocab_size) == (by_name.eod, by_name.vocab_size)


def test_published_ranks_are_known_by_their_contents(tmp_path, monkeypatch):
    import hashlib
    import inspect

    from tiktoken_ext import openai_public

    source = inspect.getsource(openai_public)
    assert all(digest in source for digest in tiktoken_files._PUBLISHED)
    assert tiktoken_files._PUBLISHED[inspect.getsource(cl100k_base).split('expected_hash="')[1][:64]] == "cl100k_base"
    path = write_ranks(tmp_path / "downloaded")
    monkeypatch.setitem(tiktoken_files._PUBLISHED, hashlib.sha256(path.read_bytes()).hexdigest(), "cl100k_base")
    assert build_tokenizer("TikTokenizer", path).eod == 100257


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, r"tiktoken\.json does not describe ranks: expected"),
        ({"pattern": 1}, "does not describe ranks"),
        ({"pattern": "x", "specials": {}}, "does not describe ranks"),
        ({"pattern": "x", "special_tokens": {"a": "b"}}, "does not describe ranks"),
        ({"encoding": "cl200k"}, "encoding 'cl200k' is not one of r50k_base"),
        ({"pattern": "x", "special_tokens": {"<a>": 3}}, "two tokens have the same id"),
    ],
)
def test_a_bad_description_ends_with_one_line(tmp_path, content, message):
    path = write_ranks(tmp_path / "qwen.tiktoken")
    describe(path, **content)
    with pytest.raises(DataError, match=message) as caught:
        build_tokenizer("TikTokenizer", path)
    assert "\n" not in str(caught.value)


def test_bad_ranks_and_a_missing_library_end_with_one_line(tmp_path, monkeypatch):
    path = write_ranks(tmp_path / "qwen.tiktoken")
    with pytest.raises(DataError, match=r"or describe it in qwen\.tiktoken\.json next to it"):
        build_tokenizer("TikTokenizer", path)
    describe(path, encoding="cl100k_base")
    good = path.read_bytes()
    path.write_bytes(good + b"?? 9\n")
    with pytest.raises(DataError, match=r"qwen\.tiktoken:270 is not a line of ranks"):
        build_tokenizer("TikTokenizer", path)
    path.write_bytes(good.split(b"\n", 1)[1])
    with pytest.raises(DataError, match="has no token for byte 0: it is incomplete"):
        build_tokenizer("TikTokenizer", path)
    path.write_bytes(good)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match="is read by tiktoken, which is not installed: pip install tiktoken"):
        build_tokenizer("TikTokenizer", path)
