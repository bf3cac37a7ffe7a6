"""Ids that a vocabulary does not have: in data of another tokenizer, or damaged."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.indexed_dataset import DataError


def first_bad_id(ids: NDArray[np.generic], vocab_size: int) -> int | None:
    """The index of the first id that is negative, or `vocab_size` or more; None where there is none."""
    if not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        return None
    return int(np.argmax(np.less(ids, 0) | np.greater_equal(ids, vocab_size)))


def describe_bad_id(value: int, vocab_size: int, place: tuple[Path, int, int]) -> str:
    """What a message says of one; `place` is its (prefix, document, offset)."""
    prefix, document, offset = place
    return (
        f"{prefix}: document {document} has id {value} at offset {offset}, and the model ids from 0 to "
        f"{vocab_size - 1}: it was made with another tokenizer, or is damaged; preprocess its text again"
    )


def check_ids(ids: NDArray[np.generic], vocab_size: int, *, prefix: Path, document: int) -> None:
    """Raise DataError where a document has an id that the vocabulary has not."""
    bad = first_bad_id(ids, vocab_size)
    if bad is not None:
        raise DataError(describe_bad_id(int(ids[bad].item()), vocab_size, (prefix, document, bad)))
