"""data.order megatron against megatron-core itself: every token of every sample, for random datasets of every shape.

Sequences of no token, documents of none or of several sequences, sets shorter than a sample, one below and one above a
whole number of samples, one sequence, many epochs, a partial last epoch, splits, blends and every type of ids.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from megatron_tf.config import ConfigError, parse_split
from megatron_tf.data import megatron_order
from megatron_tf.data.build import build_dataset, build_validation, samples_of_run
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset, write_index
from megatron_tf.data.megatron_order import MegatronOrder, normalized, samples_of_parts, split_sequences
from tests.support.training import small_run

pytest.importorskip("megatron.core.datasets.helpers_cpp", reason="megatron-core is not installed")

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]
SPLITS = ["969,30,1", "70,20,10", "1,1,1", "0.333,0.333,0.334", "8,1,1", "0.1,0.2,0.7", "3,3,3", "99.5,0.5,0", "1,1,0"]


class NoTokenizer:
    """What Megatron-LM's dataset asks a tokenizer for; its padding is no id, so that none is replaced."""

    unique_identifiers: ClassVar[dict[str, str]] = {}
    eod, pad, vocab_size = 0, -1, 50_000


def write_set(prefix, documents, dtype=np.uint16):
    """Documents, each a list of lengths of its sequences; their ids count upwards. Returns the prefix."""
    lengths = np.array([length for document in documents for length in document], np.int32)
    counts = np.array([len(document) for document in documents], np.int64)
    (np.arange(lengths.sum()) % 128).astype(dtype).tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), np.dtype(dtype), lambda: [(lengths, counts)])
    return str(prefix)


def megatrons(entries, *, seq_length, seed, sizes, split=None):
    """[training, validation] sets of megatron-core for entries of data_path; without a split, each list is whole."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    blends = [get_blend_from_list([word for entry in each for word in entry.split()]) for each in entries]
    source = {"blend": blends[0], "split": split} if split else {"blend_per_split": [*blends, None]}
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        tokenizer=NoTokenizer(),
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        **source,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [*sizes, 0], lambda: True, config).build()[:2]


def ids_of(sample):
    """Ids of a sample of megatron-core, the last label included."""
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])]


def run_of(tmp_path, entries, *, seq_length, seed, train_iters, split="1,1,1", valid=None, eval_iters=1):
    """The configuration of a run that reads these sets."""
    training = {"seq_length": seq_length, "seed": seed, "train_iters": train_iters, "eval_interval": 3}
    data = {"data_path": entries, "valid_data_path": valid, "split": split, "order": "megatron"}
    return small_run(
        training={**training, "global_batch_size": 2, "eval_iters": eval_iters},
        data={**data, "data_cache_path": str(tmp_path / "cache")},
    )


def sizes_of(config):
    return [samples_of_run(config.training, split) for split in ("train", "validation")]


def random_documents(generator, seq_length):
    """One of many shapes; at least as many sequences of tokens as there are parts of a split."""
    shape = generator.integers(5)
    if shape == 0:  # a few tokens, of one sequence each
        return [[1]] * int(generator.integers(6, 12))
    if shape == 1:  # about a whole number of samples, in all
        total = int(generator.integers(1, 4)) * seq_length + int(generator.integers(-1, 3)) + 12
        return [[1, 0] if i % 5 else [1] for i in range(11)] + [[total - 11]]
    longest = [3, 20, 60][generator.integers(3)]
    many = generator.integers(0, 4, size=int(generator.integers(6, 30)))
    documents = [generator.integers(0, longest, size=int(count)).tolist() for count in many]
    return [[2], [1, 2], *documents, [], [0], [1, 1], [2], [1], [3, 1], [1]]


def has_tokens(prefix, split):
    """Whether each part of a split has two tokens: of none megatron-core counts epochs without end."""
    lengths = IndexedDataset(prefix).lengths
    parts = zip(split_sequences(len(lengths), parse_split(split)), split.split(","), strict=True)
    return all(lengths[part.start : part.stop].sum() > 1 for part, share in parts if float(share))


def draw(generator, tmp_path):
    """(entries, split, options) of a random run whose sets have tokens in each part."""
    while True:
        seq_length, split = int(generator.integers(2, 24)), SPLITS[generator.integers(len(SPLITS))]
        prefixes = []
        for number in range(int(generator.choice([1, 1, 2, 3, 9]))):
            dtype = DTYPES[generator.integers(len(DTYPES))]
            prefixes.append(write_set(tmp_path / f"s{number}", random_documents(generator, seq_length), dtype))
        if all(has_tokens(prefix, split) for prefix in prefixes):
            break
    weights = [["0.1", "0.3", "2", "7", "0.7", "0.05"][generator.integers(6)] for _ in prefixes]
    has_weights = len(prefixes) > 1 or generator.integers(3) == 0
    entries = [f"{weight} {prefix}" for weight, prefix in zip(weights, prefixes, strict=True)]
    options = {"seq_length": seq_length, "seed": int(generator.integers(2**31))}
    return entries if has_weights else prefixes, split, options


def assert_same(ours, theirs, count):
    for i in range(count):
        assert ours[i].tolist() == ids_of(theirs[i]), f"sample {i} of {count}"


@pytest.mark.parametrize("seed", range(60))
def test_random_data_sets_and_blends_are_read_as_by_megatron_core(tmp_path, seed):
    generator = np.random.default_rng(seed)
    entries, split, options = draw(generator, tmp_path)
    train_iters, eval_iters = int(generator.integers(1, 120)), int(generator.integers(1, 4))
    config = run_of(tmp_path, entries, split=split, train_iters=train_iters, eval_iters=eval_iters, **options)
    try:
        theirs = megatrons([entries], sizes=sizes_of(config), split=split, **options)
    except IndexError:  # a part has too few samples for its turns: here it is read from its beginning again
        assert len(build_dataset(config)[sum(sizes_of(config))]) == options["seq_length"] + 1
        return
    assert_same(build_dataset(config), theirs[0], len(theirs[0]))
    if len(entries) == 1:  # of several, each is evaluated on its own here
        assert_same(build_validation(config)[0].samples, theirs[1], len(theirs[1]))


@pytest.mark.parametrize("seed", range(12))
def test_lists_of_sets_for_each_split_are_read_whole(tmp_path, seed):
    """As --train-data-path and --valid-data-path: one set with a weight is then no blend."""
    generator = np.random.default_rng(1000 + seed)
    (tmp_path / "valid").mkdir()
    entries, _, options = draw(generator, tmp_path)
    valid = [f"0.5 {write_set(tmp_path / 'valid' / 's', random_documents(generator, options['seq_length']))}"]
    train_iters = int(generator.integers(1, 60))
    config = run_of(tmp_path, entries, split="1,0,0", valid=valid, train_iters=train_iters, **options)
    theirs = megatrons([entries, valid], sizes=sizes_of(config), **options)
    assert_same(build_dataset(config), theirs[0], len(theirs[0]))
    assert_same(build_validation(config)[0].samples, theirs[1], len(theirs[1]))


@pytest.mark.parametrize("excess", [-1, 0, 1, 2])
@pytest.mark.parametrize("samples", range(2, 34, 2))
def test_partial_last_epochs_are_those_of_megatron_core(tmp_path, excess, samples):
    """Around its threshold of 0.80 of an epoch: 10 samples, with a token less or more."""
    prefix = write_set(tmp_path / "s", [[7, 5], [], [9, 0, 1], [3], [4] * 3, [80 - 41 + excess]])
    options = {"seq_length": 8, "seed": 3}
    config = run_of(tmp_path, [prefix], split="1,0,0", train_iters=samples // 2, **options)
    (theirs, _) = megatrons([[prefix]], sizes=[samples, 0], split="1,0,0", **options)
    ours = build_dataset(config)
    assert len(ours.order.locate(0)[0].shuffle) == len(theirs)
    assert_same(ours, theirs, len(theirs))


def test_a_set_shorter_than_a_sample_is_read_for_many_epochs(tmp_path):
    prefix = write_set(tmp_path / "s", [[2], [], [3]])
    options = {"seq_length": 20, "seed": 7}
    config = run_of(tmp_path, [prefix], split="1,0,0", train_iters=9, **options)
    (theirs, _) = megatrons([[prefix]], sizes=[18, 0], split="1,0,0", **options)
    assert_same(build_dataset(config), theirs, len(theirs))


def test_sets_without_weights_are_blended_by_their_sizes_and_read_once(tmp_path):
    prefixes = [write_set(tmp_path / f"s{i}", [[9 + 7 * i], [4, 5]] * 9) for i in range(3)]
    options = {"seq_length": 8, "seed": 5}
    config = run_of(tmp_path, prefixes, split="9,1,0", train_iters=30, **options)
    (theirs, _) = megatrons([prefixes], sizes=sizes_of(config), split="9,1,0", **options)
    assert len(theirs) == 60
    assert_same(build_dataset(config), theirs, len(theirs))
    config = run_of(tmp_path, prefixes, split="9,1,0", train_iters=60, **options)
    (theirs, _) = megatrons([prefixes], sizes=sizes_of(config), split="9,1,0", **options)
    assert len(theirs) == 72
    with pytest.raises(ConfigError, match=r"needs 120 samples, but its datasets have 72 in one epoch.*WEIGHT PREFIX"):
        build_dataset(config)


@pytest.mark.parametrize("seed", range(20))
def test_many_weights_choose_the_sets_of_megatron_core_at_every_step(seed):
    """Weights whose shares differ by the last bit only, or are due at one step, included."""
    from megatron.core.datasets import helpers, utils

    from megatron_tf.data._index import greedy_blend

    generator = np.random.default_rng(seed)
    count = [2, 3, 7, 8, 9, 10, 22, 33, 65, 90][seed % 10]
    weights = [float(w) for w in generator.integers(1, 8, count) * [0.1, 1 / 3][seed % 2]]
    size = 10_000
    which, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(which, samples, utils.normalize(utils.normalize(weights)), count, size, False)
    ours, _ = greedy_blend(np.array(normalized(normalized(weights))), size, are_shares=True)
    assert ours.tolist() == which.tolist()


def test_samples_of_each_part_are_those_of_the_builder():
    from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset
    from megatron.core.datasets.utils import normalize

    generator = np.random.default_rng(0)
    for _ in range(500):
        weights = generator.integers(1, 30, int(generator.integers(1, 20))) * float(generator.choice([0.1, 1 / 3]))
        asked = int(generator.integers(1, 10**7))
        theirs = _get_size_per_split_per_dataset(normalize(weights.tolist()), [asked], surplus=0.005)
        assert samples_of_parts(asked, weights.tolist()) == [size for (size,) in theirs]


def test_bounds_of_splits_are_those_of_megatron_core():
    from megatron.core.datasets import blended_megatron_dataset_config as theirs

    generator = np.random.default_rng(0)
    splits = [*SPLITS, *(",".join(f"{x:.3f}" for x in generator.random(3)) for _ in range(300))]
    for split in splits:
        matrix = theirs.convert_split_vector_to_split_matrix(theirs.parse_and_normalize_split(split))
        for count in (1, 2, 3, 5, 10, 37, 1000, 12345):
            expected = [range(*(round(end * float(count)) for end in part)) if part else None for part in matrix]
            ours = split_sequences(count, parse_split(split))
            assert [part if whole else None for part, whole in zip(ours, expected, strict=True)] == [
                part or None for part in expected
            ]


@pytest.mark.parametrize("split", ["70,20,10", "90,5,5", "0.7,0.2,0.1", "0.6,0.3,0.1", "1,2,7"])
def test_a_run_is_split_at_the_bounds_of_megatron_core(tmp_path, split):
    """Of so many sequences that rounding as for documents gives other bounds."""
    options = {"seq_length": 2, "seed": 11}
    for count in (15, 25, 30, 35):
        prefix = write_set(tmp_path / f"s{count}", [[4 + i % 7] for i in range(count)])
        if not has_tokens(prefix, split):
            continue
        config = run_of(tmp_path, [prefix], split=split, train_iters=4, **options)
        theirs = megatrons([[prefix]], sizes=sizes_of(config), split=split, **options)
        assert_same(build_dataset(config), theirs[0], len(theirs[0]))
        assert_same(build_validation(config)[0].samples, theirs[1], len(theirs[1]))


def test_an_order_of_more_places_than_32_bits_count_is_the_same(tmp_path, monkeypatch):
    lengths = np.array([5, 0, 9, 4], np.int32)
    options = {"seq_length": 4, "seed": 1, "name": "s", "samples": 40}
    short, _ = MegatronOrder(lengths, cache=tmp_path / "short", **options).locate(0)
    monkeypatch.setattr(megatron_order, "_SHORT_IDS", 8)
    long, _ = MegatronOrder(lengths, cache=tmp_path / "long", **options).locate(0)
    assert (short.documents.dtype, long.documents.dtype) == (np.uint32, np.int64)
    assert all((a == b).all() for a, b in zip(short, long, strict=True))


def test_what_megatron_core_never_ends_on_or_refuses_is_refused_by_name(tmp_path):
    empty = write_set(tmp_path / "empty", [[0], [], [0, 0]])
    short = write_set(tmp_path / "short", [[2], [3]])
    options = {"seq_length": 20, "seed": 7, "split": "1,0,0", "train_iters": 3}
    with pytest.raises(DataError, match="empty:train has no tokens"):
        build_dataset(run_of(tmp_path, [empty], **options))
    with pytest.raises(DataError, match="short:train has 5 tokens, too few for one sample"):
        build_dataset(run_of(tmp_path, [short, short], **options))
    with pytest.raises(ConfigError, match=r"data\.data_path: the weight of .*short is 0"):
        build_dataset(run_of(tmp_path, [f"0 {short}", f"1 {empty}"], **options))
