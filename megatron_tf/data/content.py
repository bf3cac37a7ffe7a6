"""Identify the content of a dataset's files, and describe how two identities differ."""

import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from megatron_tf.data.indexed_dataset import MAGIC
from megatron_tf.data.output_names import mask_prefix

_WHOLE_BYTES = 64 << 20  # index files up to this size are hashed whole, larger ones by blocks
_BLOCKS = 64
_INDEX_BLOCK, _DATA_BLOCK = 256 << 10, 64 << 10
_COUNTS = struct.Struct("<9s9xQQ")  # magic, version and type of the ids, sequences, boundaries of documents

Content = dict[str, Any]


def content_of(prefix: str) -> Content:
    """Identify the content of PREFIX.bin and PREFIX.idx by their sizes, hashes and number of documents.

    Large files are hashed by blocks spread over them, so this reads at most 64 MiB of the index and 4 MiB of the
    tokens. The identity of a missing dataset is empty.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if not (index.is_file() and data.is_file()):
        return {}
    return {
        "index_bytes": index.stat().st_size,
        "index": _digest(index, _INDEX_BLOCK, _WHOLE_BYTES),
        "data_bytes": data.stat().st_size,
        "data": _digest(data, _DATA_BLOCK, _BLOCKS * _DATA_BLOCK),
        **_count_documents(index),
        **_identify_mask(prefix),
    }


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say how the content of a dataset differs from its `old` one; empty if it does not, or if either is unknown.

    Compares the keys that both have: other versions of this program may identify a dataset by other keys.
    """
    different = [key for key in old if key in new and old[key] != new[key]]
    if not different:
        return ""
    for key, unit in (("documents", "documents"), ("data_bytes", "bytes of tokens")):
        if key in different:
            return f"{old[key]:,} -> {new[key]:,} {unit}"
    if "data" in different:
        return f"other tokens: hash {old['data'][:8]} -> {new['data'][:8]}"
    if different == ["loss_mask"]:
        return "the same tokens, but other targets in the loss"
    return f"the same tokens, but other documents: hash {old.get('index', '')[:8]} -> {new.get('index', '')[:8]}"


def _count_documents(index: Path) -> Content:
    """Return {"documents": count} of an index of Megatron-LM; empty for an older format."""
    with index.open("rb") as file:
        header = file.read(_COUNTS.size)
    if len(header) < _COUNTS.size:
        return {}
    magic, _, boundaries = _COUNTS.unpack(header)
    return {"documents": boundaries - 1} if magic == MAGIC else {}


def _identify_mask(prefix: str) -> Content:
    """Return {"loss_mask": digest}; empty for a dataset without a loss mask."""
    mask = Path(f"{mask_prefix(prefix)}.bin")
    return {"loss_mask": _digest(mask, _DATA_BLOCK, _BLOCKS * _DATA_BLOCK)} if mask.is_file() else {}


def _digest(path: Path, block: int, whole: int) -> str:
    """Hash a file of up to `whole` bytes, or evenly spaced blocks of a larger one."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if size <= whole:
            for part in iter(partial(file.read, 1 << 20), b""):
                digest.update(part)
        else:
            for number in range(_BLOCKS):
                file.seek((size - block) * number // (_BLOCKS - 1))
                digest.update(file.read(block))
    return digest.hexdigest()
