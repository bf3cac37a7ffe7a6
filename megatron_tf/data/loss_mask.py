"""Loss masks of chat data: a dataset next to the one of ids, with a byte for each id."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.indexed_dataset import DataError, IndexedDataset, blocks_of_documents, write_index
from megatron_tf.data.output_names import mask_prefix
from megatron_tf.data.published import report_of
from megatron_tf.files import concatenate

MASK_DTYPE = np.dtype(np.uint8)
_BLOCK = 1 << 24  # ids that are read at a time


def has_loss_mask(prefix: str | Path) -> bool:
    """Return whether a dataset has a loss mask: by its report, or by the files if it has no report."""
    report = report_of(prefix)
    if report is None:
        return Path(f"{mask_prefix(prefix)}.idx").is_file()
    return "targets" in report


def open_loss_mask(dataset: IndexedDataset, *, by_sequence: bool) -> IndexedDataset | None:
    """Open the loss mask of a dataset, a uint8 for each id: 1 if the id is a target, else 0. None if it has none.

    Raises DataError if the mask is missing, damaged or of other documents.
    """
    if not has_loss_mask(dataset.prefix):
        return None
    mask = IndexedDataset(mask_prefix(dataset.prefix), by_sequence=by_sequence)
    if mask.dtype != MASK_DTYPE or not np.array_equal(mask.lengths, dataset.lengths):
        raise DataError(f"{mask.prefix} is not the loss mask of {dataset.prefix}: preprocess the conversations again")
    return mask


def check_loss_mask(setting: bool | None, prefixes: Sequence[str]) -> None:
    """Raise ConfigError for `data.loss_mask` without chat data, and for chat data without a decision."""
    from megatron_tf.config import ConfigError  # preprocessing starts without pydantic

    masked = [prefix for prefix in prefixes if has_loss_mask(prefix)]
    if setting and not masked:
        raise ConfigError(
            "data.loss_mask is true, but no dataset has a loss mask: preprocess conversations with --sft, or remove it"
        )
    if setting is None and masked:
        raise ConfigError(
            f"data.loss_mask: {masked[0]} holds conversations: set it to true to train on the answers only, or to "
            f"false to train on every token"
        )


def counted(mask: IndexedDataset, extents: Sequence[tuple[int, int, int]]) -> NDArray[np.bool_]:
    """Return which ids of the (document, start, stop) of a sample count in the loss."""
    counts: NDArray[np.bool_] = np.concatenate([mask.document(*extent) for extent in extents]) != 0
    return counts


def write_loss_mask(dataset: str, masks: Sequence[Path], lengths: NDArray[np.int32]) -> int:
    """Write the loss mask of a dataset from the files of its parts; return how many ids are targets.

    `lengths` are the numbers of ids of all documents.
    """
    prefix = mask_prefix(dataset)
    data, index = Path(f"{prefix}.bin.tmp"), Path(f"{prefix}.idx.tmp")
    concatenate(masks, data)
    write_index(index, MASK_DTYPE, blocks_of_documents(lengths))
    data.replace(f"{prefix}.bin")
    index.replace(f"{prefix}.idx")
    mask = IndexedDataset(prefix)
    starts = range(0, mask.num_tokens, _BLOCK)
    return sum(int(mask.ids(start, min(start + _BLOCK, mask.num_tokens)).sum(dtype=np.int64)) for start in starts)
