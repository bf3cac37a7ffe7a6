"""Datasets created in tests."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from megatron_tf.data.batch import DocumentMasking
from megatron_tf.data.indexed_dataset import blocks_of_documents, write_index
from megatron_tf.data.loader import BatchLoader


def write_data_set(prefix, documents, dtype=np.uint16):
    """Write documents (lists of ids) as PREFIX.bin and .idx; return the prefix."""
    ids = [i for document in documents for i in document]
    np.array(ids, dtype=dtype).tofile(f"{prefix}.bin")
    write_index(
        Path(f"{prefix}.idx"),
        np.dtype(dtype),
        blocks_of_documents(np.array([len(d) for d in documents], dtype=np.int32)),
    )
    return prefix


def loader_of(dataset, batch_size, replica, replicas, consumed_samples):
    """Create a loader of micro-batches of two samples, without end-of-document handling."""
    return BatchLoader(
        dataset,
        batch_size=batch_size,
        micro_batch_size=2,
        replica=replica,
        replicas=replicas,
        consumed_samples=consumed_samples,
        masking=DocumentMasking(-1),
    )


def write_tokenizer(path, vocab_size):
    """Write a tokenizer.json of a number of words, the first of them `<|endoftext|>`; return the path."""
    words = ["<|endoftext|>", *(f"w{i}" for i in range(1, vocab_size))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(words[:1])
    tokenizer.save(str(path))
    return path
