"""The fast engine for byte-level BPE gives the ids of the tokenizers library, whatever the text."""

import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

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
from tests.support.characters import every_character
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


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Return an empty cache directory of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    assert_same_ids(neox, [template.format(character) for character in every_character()])


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


def test_an_engine_that_differs_is_not_used_and_that_is_said(neox_path, monkeypatch, caplog, own_cache):
    honest = bpe_engine.Engine.encode

    def off_by_one(self, texts):
        ids, lengths = honest(self, texts)
        return Encoded(ids + 1, lengths)

    monkeypatch.setattr(bpe_engine.Engine, "encode", off_by_one)
    HFTokenizer(neox_path)
    tokenizer = HFTokenizer(neox_path)
    assert len(caplog.records) == 2, "only good engines are remembered"
    assert "encodes '" in caplog.text
    assert "gigatoken" in caplog.text
    text = "Growth changes nothing.\n"
    reference = tokenizers.Tokenizer.from_file(str(neox_path)).encode(text).ids
    assert tokenizer.encode_batch([text]).ids.tolist() == reference


def test_an_engine_is_checked_once(neox_path, monkeypatch, own_cache):
    checks = []
    honest = bpe_engine._difference
    monkeypatch.setattr(bpe_engine, "_difference", lambda *facts: checks.append(1) or honest(*facts))
    first, second = HFTokenizer(neox_path), HFTokenizer(neox_path)
    assert len(checks) == 1
    assert second._engine is not None
    assert (second.vocab_size, second.eod) == (first.vocab_size, first.eod) == (50277, 0)
    assert "_reference" not in vars(second), "loading the library's tokenizer takes a tenth of a second"
    assert HFTokenizer(neox_path, eod_token="Ġthe").eod == first._reference.token_to_id("Ġthe")


def test_an_engine_is_checked_again_for_another_tokenizer_or_another_library(
    neox_path, monkeypatch, tmp_path, own_cache
):
    checks = []
    monkeypatch.setattr(bpe_engine, "_difference", lambda *facts: checks.append(1))
    HFTokenizer(neox_path)
    other = tmp_path / "other.json"
    other.write_text(neox_path.read_text().replace('"<|padding|>"', '"<|filling|>"'))
    HFTokenizer(other)
    assert len(checks) == 2
    monkeypatch.setattr("megatron_tf.data.engine_verdicts._build_of", lambda module: "newer")
    HFTokenizer(neox_path)
    monkeypatch.setattr(bpe_engine, "PROBES", [*bpe_engine.PROBES, "one more"])
    HFTokenizer(neox_path)
    assert len(checks) == 4


def test_without_a_cache_every_process_checks(neox_path, monkeypatch, own_cache):
    own_cache.write_text("a file where the directory should be")
    assert HFTokenizer(neox_path)._engine is not None


def test_special_tokens_with_other_ids_are_a_difference(neox):
    tokenizer, reference = neox
    moved = tokenizer._content._replace(special_tokens={"<|endoftext|>": 5})
    assert "special tokens" in bpe_engine._difference(tokenizer._engine, moved, reference)


def test_a_batch_and_one_text_after_another_give_the_same_ids(neox):
    """The engine encodes in one of two ways, depending on how much text there is."""
    tokenizer, _ = neox
    generator = random.Random(2)
    texts = ["wörd " * generator.randrange(300) + "x" * generator.randrange(5) for _ in range(200)]
    one_by_one = bpe_engine.Engine(tokenizer._engine._tokenizer).encode(texts)
    batch = bpe_engine.Engine(tokenizer._engine._tokenizer, few_characters=0).encode(texts)
    assert one_by_one.ids.tolist() == batch.ids.tolist()
    assert one_by_one.lengths.tolist() == batch.lengths.tolist()


def test_threads_may_encode_while_the_engine_changes_from_one_way_to_the_other(neox):
    """The engine refuses a text while another thread encodes a batch."""
    tokenizer, _ = neox
    batches = [[f"{i} {j} " + "The quick brown fox, 12345 times. " * 70 for j in range(400)] for i in range(8)]
    size = sum(map(len, batches[0]))
    expected = bpe_engine.Engine(tokenizer._engine._tokenizer, few_characters=0).encode(batches[-1])
    for few_batches in range(1, 7):  # a batch of the one kind meets one of the other
        engine = bpe_engine.Engine(tokenizer._engine._tokenizer, few_characters=few_batches * (size + 100))
        with ThreadPoolExecutor(2) as pool:
            *_, last = pool.map(engine.encode, batches)
        assert last.ids.tolist() == expected.ids.tolist()


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
