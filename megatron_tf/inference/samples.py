"""Samples of a text to run a model on, in the order of the documents."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.data.bad_ids import check_ids
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.inference.tokenizer import check_made_with


def samples_for(record: RunRecord, prefix: Path, num_tokens: int) -> list[Tensor]:
    """Read samples as the model of a record was trained with. Raises DataError for data of another tokenizer."""
    check_made_with(prefix, record.tokenizer)
    return read_samples(prefix, vocab_size=record.model.vocab_size, seq_length=record.seq_length, num_tokens=num_tokens)


def read_samples(prefix: Path, *, vocab_size: int, seq_length: int, num_tokens: int) -> list[Tensor]:
    """Read about `num_tokens` ids from the front of a dataset, in samples [seq_length + 1].

    Raises DataError where it has less than one sample, or ids that the model does not have.
    """
    dataset = IndexedDataset(prefix)
    wanted = max(1, num_tokens // seq_length) * (seq_length + 1)
    have = 0
    parts = []
    for i in range(len(dataset)):
        parts.append(np.asarray(dataset.document(i), dtype=np.int64))
        check_ids(parts[-1], vocab_size, prefix=prefix, document=i)
        have += len(parts[-1])
        if have >= wanted:
            break
    ids = torch.from_numpy(np.concatenate([*parts, np.empty(0, np.int64)])[:wanted])
    count = len(ids) // (seq_length + 1)
    if not count:
        raise DataError(f"{prefix} holds {len(ids)} tokens, a sample takes {seq_length + 1}")
    return list(ids[: count * (seq_length + 1)].unflatten(0, (count, -1)))
