"""Data sets made in a test."""

from pathlib import Path

import numpy as np

from megatron_tf.data.indexed_dataset import blocks_of_documents, write_index


def write_data_set(prefix, documents, dtype=np.uint16):
    """Documents, lists of ids, as PREFIX.bin and .idx; returns the prefix."""
    ids = [i for document in documents for i in document]
    np.array(ids, dtype=dtype).tofile(f"{prefix}.bin")
    write_index(
        Path(f"{prefix}.idx"),
        np.dtype(dtype),
        blocks_of_documents(np.array([len(d) for d in documents], dtype=np.int32)),
    )
    return prefix
