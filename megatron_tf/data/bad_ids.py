"""Checks for ids outside the vocabulary, as in damaged data or data made with another tokenizer."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.indexed_dataset import DataError


def first_bad_id(ids: NDArray[np.generic], vocab_size: int) -> int | None:
    """Return the index of the first id outside [0, vocab_size), or None if all are valid."""
    if not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        return None
    return int(np.argmax(np.less(ids, 0) | np.greater_equal(ids, vocab_size)))


def describe_bad_id(value: int, vocab_size: int, place: tuple[Path, int, int]) -> str:
    """Format the error message for an invalid id at `place`, its (prefix, document, offset)."""
    prefix, document, offset = place
    return (
        f"{prefix}: document {document} has id {value} at offset {offset}, but the model has ids 0 to "
        f"{vocab_size - 1}: it was made with another tokenizer, or is damaged; preprocess its text again"
    )


def check_ids(ids: NDArray[np.generic], vocab_size: int, *, prefix: Path, document: int) -> None:
    """Raise DataError if a document has an id outside the vocabulary."""
    bad = first_bad_id(ids, vocab_size)
    if bad is not None:
        raise DataError(describe_bad_id(int(ids[bad].item()), vocab_size, (prefix, document, bad)))
