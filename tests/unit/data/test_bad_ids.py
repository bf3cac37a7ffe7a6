"""Ids that a vocabulary does not have are named with dataset, document and offset, wherever they are read."""

import numpy as np
import pytest

from megatron_tf.commands import inspect_dataset
from megatron_tf.data.bad_ids import first_bad_id
from megatron_tf.data.blend import BlendedDataset, SpacedBlend
from megatron_tf.data.gpt_dataset import GPTDataset
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset, write_index
from megatron_tf.data.order import SampleOrder
from megatron_tf.data.tokenizer import NullTokenizer
from megatron_tf.inference.perplexity import read_tokenized
from megatron_tf.model.samples import read_samples
from tests.support.data import write_data_set

VOCAB = 257


def write_with(folder, bad):
    """Three documents of int32; the second has a bad id at offset 2."""
    return write_data_set(folder / "d", [[1, 2, 3], [4, 5, bad, 7], [8] * 20], np.int32)


@pytest.mark.parametrize(
    "ids, expected",
    [([], None), ([0, 256], None), ([0, -1], 1), ([3, 257, -1], 1), ([2**31 - 1], 0), ([-(2**31)], 0)],
)
def test_the_first_id_outside_the_vocabulary_is_found(ids, expected):
    assert first_bad_id(np.array(ids, np.int32), VOCAB) == expected


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_a_bad_id_to_predict_is_named(tmp_path, bad):
    dataset = IndexedDataset(write_with(tmp_path, bad))
    with pytest.raises(DataError, match=rf"d: document 1 has id {bad} at offset 2, but the model has ids 0 to 256"):
        list(read_tokenized(dataset, range(3), mask=None, tokenizer=NullTokenizer(), vocab_size=VOCAB))


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_a_bad_id_among_those_that_verify_a_conversion_is_named(tmp_path, bad):
    with pytest.raises(DataError, match=rf"d: document 1 has id {bad} at offset 2"):
        read_samples(write_with(tmp_path, bad), vocab_size=VOCAB, seq_length=4, num_tokens=20)


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_inspection_names_the_first_bad_id(tmp_path, capsys, bad):
    prefix = write_with(tmp_path, bad)
    assert inspect_dataset.main([str(prefix), "--tokenizer-type", "NullTokenizer"]) == 1
    assert f"document 1 has id {bad} at offset 2" in capsys.readouterr().err


@pytest.mark.parametrize("by_sequence", [False, True])
def test_every_token_of_a_sample_is_found_again_where_it_is_said_to_be(tmp_path, by_sequence):
    lengths, counts = np.array([3, 0, 5, 2, 7, 1], np.int32), np.array([0, 2, 1, 0, 3, 0])
    np.arange(18, dtype=np.uint16).tofile(tmp_path / "d.bin")
    write_index(tmp_path / "d.idx", np.dtype(np.uint16), lambda: [(lengths, counts)])
    dataset, whole = IndexedDataset(tmp_path / "d", by_sequence), IndexedDataset(tmp_path / "d")
    order = SampleOrder(dataset.document_lengths, seq_length=4, seed=1, name="d", cache=tmp_path / "cache")
    blend = BlendedDataset([GPTDataset(dataset, range(len(dataset)), order)] * 2, SpacedBlend([1.0, 2.0]))
    for step in range(20):
        for position, value in enumerate(blend[step].tolist()):
            prefix, document, offset = blend.place(step, position)
            assert prefix == tmp_path / "d"
            assert int(whole.document(document)[offset]) == value
