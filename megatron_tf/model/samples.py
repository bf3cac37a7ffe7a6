"""Samples of a dataset for the model of a checkpoint, in the order of the documents, and whose tokenizer made it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_tf.checkpoint.record import RunRecord, is_same_tokenizer
from megatron_tf.data.bad_ids import check_ids
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.published import report_of


def samples_for(record: RunRecord, prefix: Path, num_tokens: int) -> list[Tensor]:
    """Read samples of the sequence length of a record's model. Raises DataError for data of another tokenizer."""
    check_made_with(prefix, record.tokenizer)
    return read_samples(prefix, vocab_size=record.model.vocab_size, seq_length=record.seq_length, num_tokens=num_tokens)


def read_samples(prefix: Path, *, vocab_size: int, seq_length: int, num_tokens: int) -> list[Tensor]:
    """Read about `num_tokens` ids from the start of a dataset, as samples [seq_length + 1].

    Raises DataError if it has less than one sample, or ids outside the vocabulary.
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


def check_made_with(prefix: str | Path, tokenizer: Mapping[str, Any]) -> None:
    """Check that a dataset was made with the tokenizer of a checkpoint's record, by the report PREFIX.json.

    Raises DataError if it was made with another. Datasets of other programs have no report and pass.
    """
    report = report_of(prefix)
    if report is not None and not is_same_tokenizer(tokenizer, report["tokenizer"]):
        raise DataError(
            f"{prefix} was made with another tokenizer ({report['tokenizer']}) than the model was trained with "
            f"({dict(tokenizer)}): choose data of that tokenizer, or preprocess the data again"
        )
