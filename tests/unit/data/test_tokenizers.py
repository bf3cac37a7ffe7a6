"""The fast engine for byte-level BPE gives the ids of the tokenizers library, whatever the text."""

import random
import sys
import tracemalloc

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
pytest.importorskip("tiktoken", reason="tiktoken is not installed")

import tiktoken
import tokenizers
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from megatron_tf.data import bpe_engine
from megatron_tf.data.encoded import Encoded
from megatron_tf.data.tokenizer import HFTokenizer, build_tokenizer
from tests.support.paths import DATA, EXAMPLES


@pytest.fixture(scope="module")
def neox_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "gpt-neox-20b.json"
    path.write_bytes(zstd.decompress((DATA / "gpt-neox-20b.json.zst").read_bytes()))
    return path


@pytest.fixture(scope="module")
def neox(neox_path):
    tokenizer = HFTokenizer(neox_path)
    assert tokenizer._engine is not None
    return tokenizer, tokenizers.Tokenizer.from_file(str(neox_path))


def assert_same_ids(pair, texts):
    tokenizer, reference = pair
    expected = [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]
    for text, row, ids in zip(texts, tokenizer.encode_batch(texts).rows(), expected, strict=True):
        assert row.tolist() == ids, repr(text[:100])


def test_real_text(neox):
    with zstd.open(EXAMPLES / "data" / "pile_sample_heldout.jsonl.zst") as file:
        assert_same_ids(neox, [line.decode() for line in file])


@pytest.mark.slow
@pytest.mark.parametrize("template", ["a{}b", "a\u0345{}\u0334", "'s{}'s"])
def test_every_character_there_is(neox, template):
    """Library versions differ in their Unicode tables; this covers classes and the order of combining marks."""
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000 and not 0x40000 <= i < 0xE0000]
    characters = characters[: 0x40000 - 0x800] + characters[0x40000 - 0x800 :: 61]  # the private planes are alike
    assert_same_ids(neox, [template.format(character) for character in characters])


def test_without_the_check_of_characters_ids_differ(neox, monkeypatch):
    """The check is what makes the test above pass."""
    monkeypatch.setattr("megatron_tf.data.tokenizer.is_settled", lambda text: True)
    tokenizer, reference = neox
    text = "a\u0345\u1ac0\u0334"
    assert tokenizer.encode_batch([text]).ids.tolist() != reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("words", ["quick brown ", "быстрая лиса ", "γρήγορη καφέ ", "தமிழ் ", "ไทยำ "])
def test_the_check_of_characters_takes_no_memory_for_each_character(words):
    """A list of them took 43 MiB for each MB of Greek."""
    text = words * (1_000_000 // len(words))
    tracemalloc.start()
    bpe_engine.is_settled(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


ADDED = ["<|endoftext|>", "<|padding|>", "  ", "    ", " " * 24]
PIECES = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from(
        [*ADDED, " ", "\n", "\t", "\r\n", "'s", "'LL", "\x00", "e\u0301", "👩‍👩‍👧", "🇩🇪", "ab", "12", "<|"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.lists(PIECES, max_size=60).map("".join), min_size=1, max_size=20))
def test_adversarial_text(neox, texts):
    assert_same_ids(neox, texts)


def test_very_long_words_and_runs(neox):
    generator = random.Random(1)
    word = "".join(generator.choice("abcdefgh") for _ in range(5_000))
    assert_same_ids(
        neox, [word, " " * 5_000, "\n" * 5_000 + "x", "é" * 3_000, "12" * 3_000, "!?" * 3_000, " \n" * 3_000]
    )


def test_an_engine_that_differs_is_not_used_and_that_is_said(neox_path, monkeypatch, caplog):
    honest = bpe_engine.encode_flat

    def off_by_one(tokenizer):
        def encode(texts):
            ids, lengths = honest(tokenizer)(texts)
            return Encoded(ids + 1, lengths)

        return encode

    monkeypatch.setattr(bpe_engine, "encode_flat", off_by_one)
    tokenizer = HFTokenizer(neox_path)
    assert "encodes '" in caplog.text
    assert "gigatoken" in caplog.text
    text = "Growth changes nothing.\n"
    reference = tokenizers.Tokenizer.from_file(str(neox_path)).encode(text).ids
    assert tokenizer.encode_batch([text]).ids.tolist() == reference


def test_a_model_the_engine_does_not_know(tmp_path, caplog):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="b"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "words.json"))
    tokenizer = build_tokenizer("HFTokenizer", tmp_path / "words.json")
    assert [row.tolist() for row in tokenizer.encode_batch(["a b", "", "a"]).rows()] == [[0, 1], [], [0]]
    assert len(caplog.records) == 1


def test_tiktoken_ranks(tmp_path):
    import base64

    ranks = {bytes([i]): i for i in range(256)}
    for merged in (b"th", b"the", b" the", b"in", b"ing", b"  "):
        ranks[merged] = len(ranks)
    path = tmp_path / "r50k_base.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    tokenizer = build_tokenizer("TikTokenizer", path)
    reference = tiktoken.Encoding("test", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    with zstd.open(EXAMPLES / "data" / "pile_sample_heldout.jsonl.zst") as file:
        texts = [line.decode()[:20000] for line in file][:40]
    encoded = tokenizer.encode_batch(texts)
    assert [row.tolist() for row in encoded.rows()] == reference.encode_ordinary_batch(texts)
    assert tokenizer.decode(encoded.rows()[0].tolist()) == texts[0]
    assert tokenizer.eod == 50256
