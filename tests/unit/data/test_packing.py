"""Best-fit packing: against a plain implementation item by item, and rows against the documents they are made of."""

import itertools

import numpy as np
import pytest

from megatron_tf.config import ConfigError
from megatron_tf.data.batch import DocumentMasking, collate
from megatron_tf.data.best_fit import best_fit
from megatron_tf.data.gpt_dataset import GPTDataset
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.order import SampleOrder
from megatron_tf.data.packed_dataset import PackedDataset, packing_reports
from megatron_tf.data.packed_order import PackedOrder
from tests.support.data import write_data_set
from tests.support.training import small_run

END = 0
ROW = 16


def spaces_item_by_item(sizes, capacity):
    """The free space of each row when every item, from the largest on, goes where the least room is left."""
    spaces = []
    for size in sorted(sizes, reverse=True):
        rooms = [space for space in spaces if space >= size]
        if rooms:
            spaces.remove(min(rooms))
        spaces.append((min(rooms) if rooms else capacity) - size)
    return sorted(spaces)


@pytest.mark.parametrize("seed", range(200))
def test_packing_is_best_fit_decreasing(seed):
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(1, 40))
    sizes = generator.integers(1, capacity + 1, generator.integers(0, 80))
    packing = best_fit(np.bincount(sizes, minlength=capacity + 1), capacity)
    used = np.bincount(packing.row, weights=np.sort(sizes)[::-1], minlength=packing.num_rows)
    assert sorted((capacity - used).tolist()) == spaces_item_by_item(sizes.tolist(), capacity)


@pytest.fixture
def dataset(tmp_path):
    """Documents of unique ids that end with END: shorter and longer than rows, as long as one and two rows, empty."""
    lengths = [1, 2, 3, 5, 7, 8, 9, 11, 15, ROW, ROW + 1, 2 * ROW, 50, 0, 4, 4, 4, 6, 6, 13]
    ids = iter(range(1, sum(lengths)))
    documents = [[*(next(ids) for _ in range(length - 1)), END] if length else [] for length in lengths]
    return IndexedDataset(write_data_set(tmp_path / "d", documents)), tmp_path / "cache"


def packed(dataset, seed=1, name="d", mask=None):
    indexed, cache = dataset
    order = PackedOrder(indexed.document_lengths, seq_length=ROW, seed=seed, name=name, cache=cache)
    return PackedDataset(indexed, range(len(indexed)), order, mask)


def epoch_of(samples, epoch=0):
    count = samples.order.samples_per_epoch
    return [samples.read(epoch * count + i) for i in range(count)]


def pieces_of(row):
    """The ids of each document in a row, by their lengths; the padding is dropped."""
    bounds = np.cumsum([1, *row.document_lengths])
    pieces = [(row.ids[a:b], row.counts[a:b]) for a, b in itertools.pairwise(bounds)]
    return [ids.tolist() for ids, counts in pieces if counts.all()]


@pytest.mark.parametrize("epoch", [0, 1, 300])
def test_rows_hold_each_document_once_and_cut_only_those_that_are_longer(dataset, epoch):
    samples = packed(dataset)
    expected = []
    for number in range(len(dataset[0])):
        document = dataset[0].document(number).tolist()
        expected += [document[i : i + ROW] for i in range(0, len(document), ROW)]
    rows = epoch_of(samples, epoch)
    assert sorted(piece for row in rows for piece in pieces_of(row)) == sorted(expected)
    for row in rows:
        assert len(row.ids) == ROW + 1
        assert row.ids[0] == END
        assert not row.counts[0]
        assert sum(row.document_lengths) == ROW
        assert (row.ids[~row.counts] == END).all()


def test_rows_are_those_of_the_report(dataset):
    samples = packed(dataset)
    report, rows = samples.order.report(), epoch_of(samples)
    assert (report.rows, report.tokens) == (len(rows), sum(int(row.counts.sum()) for row in rows))
    assert (report.documents, report.cut) == (19, 3)
    assert packing_reports(samples) == [report]
    assert f"{ROW * len(rows) - report.tokens}" in str(report)
    lengths = dataset[0].document_lengths
    spaces = spaces_item_by_item([length % ROW for length in lengths.tolist() if length % ROW], ROW)
    assert len(rows) == len(spaces) + int((lengths // ROW).sum())


def test_the_report_counts_what_concatenation_cuts(dataset):
    indexed, cache = dataset
    order = SampleOrder(indexed.document_lengths, seq_length=ROW, seed=1, name="d", cache=cache)
    concatenated = GPTDataset(indexed, range(len(indexed)), order)
    starts = [next(concatenated._extents(i))[:2] for i in range(order.samples_per_epoch)]
    tail = int(order.lengths.sum()) % ROW  # the last boundary starts no sample
    cut = {document for document, offset in starts if offset}
    found = packed(dataset).order.report().cut_by_concatenation
    assert found - len(cut) in ((0, 1) if tail else (0,))


def test_epochs_seeds_and_names_mix_documents_anew(dataset):
    first = [sorted(map(str, pieces_of(row))) for row in epoch_of(packed(dataset))]
    assert first == [sorted(map(str, pieces_of(row))) for row in epoch_of(packed(dataset))]
    for others in (
        epoch_of(packed(dataset), 1),
        epoch_of(packed(dataset, seed=2)),
        epoch_of(packed(dataset, name="e")),
    ):
        assert len(others) == len(first)
        assert sorted(first) != sorted(sorted(map(str, pieces_of(row))) for row in others)


def test_attention_and_loss_keep_to_the_documents(dataset):
    """Inputs of a document are the end before it and its ids but the last; the targets are its ids."""
    samples = packed(dataset)
    numbers = np.arange(samples.order.samples_per_epoch)[None]
    rows = epoch_of(samples)
    masking = DocumentMasking(END, reset_attention=True)
    batch = collate(rows, numbers, masking, has_loss_mask=samples.has_loss_mask)
    assert batch.num_targets == int(dataset[0].document_lengths.sum())
    for row, starts, ignored in zip(rows, batch.document_starts[0].tolist(), batch.ignored[0].numpy(), strict=True):
        inputs, targets = row.ids[:-1], row.ids[1:]
        assert sorted({*starts}) == np.cumsum([0, *row.document_lengths[:-1]]).tolist()
        for start in {*starts}:
            members = [i for i, s in enumerate(starts) if s == start]
            assert inputs[start] == END
            assert inputs[members][1:].tolist() == targets[members][:-1].tolist()
        assert targets[~ignored].tolist() == [i for piece in pieces_of(row) for i in piece]


def test_places_are_those_of_the_tokens(dataset):
    samples = packed(dataset)
    for sample in range(samples.order.samples_per_epoch):
        row = samples.read(sample)
        for position in np.flatnonzero(row.counts).tolist():
            prefix, document, offset = samples.place(sample, position)
            assert prefix == dataset[0].prefix
            assert dataset[0].document(document)[offset] == row.ids[position]
        with pytest.raises(IndexError):
            samples.place(sample, 0)


def test_a_document_without_its_end_is_refused_where_another_follows(tmp_path):
    indexed = IndexedDataset(write_data_set(tmp_path / "d", [[1, END], [2, 3], [4, END]]))
    samples = packed((indexed, tmp_path / "cache"))
    with pytest.raises(DataError, match=r"does not end with id 0, .* preprocess the text with --append-eod"):
        [samples.read(i) for i in range(20)]  # in one of these epochs it is not the last of its row


@pytest.mark.parametrize("order", ["lanes", "megatron"])
def test_orders_that_read_end_to_end_are_refused(order):
    with pytest.raises(ConfigError, match=f"data.order {order} reads documents end to end: set data.order to counter"):
        small_run(data={"packing": "best_fit", "order": order})


def test_a_set_without_tokens_is_refused(tmp_path):
    indexed = IndexedDataset(write_data_set(tmp_path / "d", [[], []]))
    with pytest.raises(DataError, match="d has no tokens"):
        packed((indexed, tmp_path / "cache"))


def test_rows_of_wide_ids_keep_their_type(tmp_path):
    indexed = IndexedDataset(write_data_set(tmp_path / "d", [[70_000, 1]], np.int32))
    row = packed((indexed, tmp_path / "cache")).read(0)
    assert row.ids.dtype == np.int32
    assert row.ids.tolist() == [1, 70_000, 1] + 14 * [1]
