"""Indexed datasets byte by byte, the order of samples, the loader and tokenizers."""

import hashlib
import json
import multiprocessing
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_tf.config import ConfigError, parse_split
from megatron_tf.data import indexed_dataset, order_cache
from megatron_tf.data.gpt_dataset import GPTDataset, split_documents
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset, token_dtype
from megatron_tf.data.megatron_order import MegatronOrder
from megatron_tf.data.order import SampleOrder
from megatron_tf.data.tokenizer import build_tokenizer
from tests.support.data import loader_of, write_data_set
from tests.support.paths import ROOT

SAMPLE = Path(__file__).parents[3] / "examples" / "data" / "pile_sample_heldout.jsonl.zst"
DOCUMENTS = [[1, 2, 3], [], [4, 5, 6, 7, 8], [9]]


def test_bytes_are_those_of_megatron(tmp_path):
    prefix = write_data_set(tmp_path / "d", DOCUMENTS)
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<9H", *range(1, 10))
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 5)
    expected += struct.pack("<3i", 3, 5, 1) + struct.pack("<3q", 0, 6, 16) + struct.pack("<5q", 0, 1, 1, 2, 3)
    assert Path(f"{prefix}.idx").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


@pytest.mark.parametrize("code, letter", [(8, "H"), (4, "i")])
@pytest.mark.parametrize("modes", [b"", bytes(4)])
def test_files_of_megatron_and_gpt_neox_are_read_as_they_are(code, letter, modes, tmp_path):
    """As both write them: uint16 or int32, a document of two sequences, one of none; Megatron may append modes."""
    lengths, documents, size = [3, 2, 4, 1], [0, 2, 2, 3, 4], struct.calcsize(letter)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    offsets = [size * sum(lengths[:i]) for i in range(len(lengths))]
    index += struct.pack("<4i", *lengths) + struct.pack("<4q", *offsets) + struct.pack("<5q", *documents)
    (tmp_path / "d.idx").write_bytes(index + modes)
    (tmp_path / "d.bin").write_bytes(struct.pack(f"<10{letter}", *range(10)))
    dataset = IndexedDataset(tmp_path / "d")
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == [[0, 1, 2, 3, 4], [], [5, 6, 7, 8], [9]]
    assert dataset.document_lengths.tolist() == [5, 0, 4, 1]
    samples = gpt((dataset, tmp_path / "cache"), seq_length=9)
    assert sorted(samples[0].tolist()) == list(range(10))


def test_documents_come_back(tmp_path):
    dataset = IndexedDataset(write_data_set(tmp_path / "d", DOCUMENTS, np.int32))
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_lengths.tolist() == [3, 0, 5, 1]
    assert dataset.document(2, 1, 3).tolist() == [5, 6]
    assert (token_dtype(65499), token_dtype(65500)) == (np.uint16, np.int32)


def test_an_index_of_many_blocks_is_that_of_one(tmp_path, monkeypatch):
    documents = [list(range(i % 5)) for i in range(1000)]
    write_data_set(tmp_path / "one", documents)
    monkeypatch.setattr(indexed_dataset, "INDEX_BLOCK", 7)
    write_data_set(tmp_path / "many", documents)
    assert (tmp_path / "one.idx").read_bytes() == (tmp_path / "many.idx").read_bytes()
    dataset = IndexedDataset(tmp_path / "many")
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == documents


def test_mutated_indices_are_refused_or_read_rightly(tmp_path):
    prefix = write_data_set(tmp_path / "d", DOCUMENTS)
    index = Path(f"{prefix}.idx")
    original = index.read_bytes()
    generator, refused = random.Random(1), 0
    for _ in range(3000):
        data = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        data = data[: generator.randrange(len(data) + 1)] if generator.random() < 0.2 else data
        index.write_bytes(data)
        try:
            dataset = IndexedDataset(prefix)
            read = [len(dataset.document(i)) for i in range(len(dataset))]
            assert sum(read) == dataset.num_tokens
        except DataError:
            refused += 1
    assert refused > 2500


@pytest.fixture
def dataset(tmp_path):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 1000, size) for size in generator.integers(0, 40, 60)]
    return IndexedDataset(write_data_set(tmp_path / "d", documents)), tmp_path / "cache"


def gpt(dataset, seed=1, name="d", documents=None, seq_length=8):
    indexed, cache = dataset
    documents = documents or range(len(indexed))
    lengths = indexed.document_lengths[documents.start : documents.stop]
    order = SampleOrder(lengths, seq_length=seq_length, seed=seed, name=name, cache=cache)
    return GPTDataset(indexed, documents, order)


def test_an_epoch_is_the_documents_end_to_end(dataset):
    samples = gpt(dataset)
    order, _ = samples.order.locate(0)
    stream = np.concatenate([dataset[0].document(int(d)) for d in order.documents])
    count = samples.order.samples_per_epoch
    for i in range(count):
        place = int(order.shuffle[i])
        assert samples[i].tolist() == stream[place * 8 : place * 8 + 9].tolist()
    assert sorted(order.shuffle.tolist()) == list(range(count))


def test_epochs_seeds_and_names_have_orders_of_their_own(dataset):
    count = gpt(dataset).order.samples_per_epoch
    epochs = [[gpt(dataset)[e * count + i].tolist() for i in range(count)] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert gpt(dataset, seed=2)[0].tolist() != epochs[0][0]
    assert gpt(dataset, name="e")[0].tolist() != epochs[0][0]
    assert [gpt(dataset)[i].tolist() for i in range(count)] == epochs[0]


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_cache_is_rebuilt(dataset, damage):
    before = [gpt(dataset)[i].tolist() for i in range(5)]
    for path in dataset[1].glob("order-*/offset.npy"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-3])
        if damage == "missing":
            path.unlink()
    assert [gpt(dataset)[i].tolist() for i in range(5)] == before


def test_an_order_that_another_process_builds_is_waited_for_with_an_end(dataset, monkeypatch):
    monkeypatch.setattr(order_cache, "LOCK_TIMEOUT_SECONDS", 0.2)
    samples = gpt(dataset)
    monkeypatch.setattr(samples.order, "_build", lambda epoch: gpt(dataset)[0])  # would wait for the lock that it holds
    with pytest.raises(DataError, match="another process held the lock"):
        samples[0]


def build_and_tell(arguments):
    """In a process of its own: a sample, and whether this process built the order."""
    built = []
    cache, lengths = arguments
    write = order_cache._write
    order_cache._write = lambda *rest: (built.append(1), write(*rest))
    order = SampleOrder(lengths, seq_length=8, seed=1, name="d", cache=cache)
    return order.locate(3)[1], len(built)


@pytest.mark.slow
def test_many_processes_build_an_order_once(tmp_path):
    lengths = np.full(200_000, 30, dtype=np.int32)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        answers = pool.map(build_and_tell, [(tmp_path, lengths)] * 4, chunksize=1)
    assert len({place for place, _ in answers}) == 1
    assert sum(built for _, built in answers) == 1


GOLDEN_ORDERS = json.loads((ROOT / "tests" / "golden" / "megatron_order.json").read_text())


@pytest.mark.parametrize("case", GOLDEN_ORDERS, ids=lambda case: f"{case['samples']}-of-{case['total']}")
def test_megatrons_order_bit_for_bit(tmp_path, case):
    """Every token of every sample, computed by megatron-core 0.16.1 over documents that count upwards."""
    lengths = np.array(case["lengths"], dtype=np.int32)
    ids = np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
    indexed = IndexedDataset(write_data_set(tmp_path / "d", [part.tolist() for part in ids]))
    options = {"seq_length": case["seq_length"], "seed": case["seed"], "samples": case["samples"]}
    order = MegatronOrder(indexed.document_lengths, name="d", cache=tmp_path / "cache", **options)
    samples = GPTDataset(indexed, range(len(lengths)), order)
    arrays, _ = samples.order.locate(0)
    assert arrays.documents[:8].tolist() == case["first_documents"]
    assert arrays.shuffle[:8].tolist() == case["first_shuffled"]
    digest = hashlib.sha256(b"".join(samples[i].astype(np.int64).tobytes() for i in range(case["samples"])))
    assert digest.hexdigest() == case["tokens_sha256"]
    assert samples[case["total"]].tolist() == samples[0].tolist() != samples[case["total"] - 1].tolist()


def test_too_few_tokens(dataset):
    with pytest.raises(DataError, match="too few for one sample"):
        gpt(dataset, seq_length=10**6)


def test_splits_are_over_documents():
    assert split_documents(1000, parse_split("969,30,1")) == (range(969), range(969, 999), range(999, 1000))


@pytest.mark.parametrize("bad", ["1,2", "a,b,c", "0,0,0", "-1,1,1", "nan,1,1", ""])
def test_a_split_has_three_shares(bad):
    with pytest.raises(ConfigError, match=r"--split is .*three shares"):
        parse_split(bad, key="--split")


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_replicas(dataset, replicas):
    samples = gpt(dataset)
    loaders = [loader_of(samples, lambda _: 8, replica, replicas, 16) for replica in range(replicas)]
    next(loaders[0]), [next(loader) for loader in loaders[1:]]
    batches = np.stack([next(loader).ids.numpy() for loader in loaders], axis=1)
    expected = [samples[i].tolist() for i in range(24, 32)]
    assert batches.reshape(8, 9).tolist() == expected
    assert all(loader.consumed_samples == 32 for loader in loaders)


@pytest.mark.parametrize(
    "text", ["", "the tab\tand\n\nlines  ", " leading", "naïve café — 你好 \U0001f600", "a\x00b", "0123456789"]
)
def test_tokenizers_give_the_text_back(tmp_path_factory, text):
    from megatron_tf.commands import train_tokenizer

    prefix = tmp_path_factory.getbasetemp() / "tokenizer"
    if not Path(f"{prefix}.model").exists():
        options = ["--input", str(SAMPLE), "--vocab-size", "600", "--output-prefix", str(prefix)]
        assert train_tokenizer.main([*options, "--max-sentences", "3000"]) == 0
    trained = build_tokenizer("SentencePieceTokenizer", Path(f"{prefix}.model"))
    for tokenizer in (trained, build_tokenizer("NullTokenizer", None)):
        assert tokenizer.decode(tokenizer.encode_batch([text]).ids.tolist()) == text


def test_tokenizer_mistakes(tmp_path):
    with pytest.raises(DataError, match="did you mean HFTokenizer"):
        build_tokenizer("HFTokenizr", None)
    with pytest.raises(DataError, match="needs a tokenizer file"):
        build_tokenizer("HFTokenizer", tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="is not a HFTokenizer file"):
        build_tokenizer("HFTokenizer", tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"NullTokenizer reads no file: leave .*bad\.json out"):
        build_tokenizer("NullTokenizer", tmp_path / "bad.json")
