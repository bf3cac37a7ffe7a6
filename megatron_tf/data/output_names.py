"""Names of datasets: different keys and different values of `meta` never share a name."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_tf.data.indexed_dataset import DataError

MAX_NAME = 256  # characters; .documents.npz stores every name in the width of the longest
_MAX_FILE_NAME = 100
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")


def set_name(value: object) -> str:
    """Return the name of a set; a long one is truncated and gets a hash that keeps it unique."""
    name = str(value)
    if len(name) <= MAX_NAME and "\0" not in name:
        return name
    return f"{name[:200].replace(chr(0), ' ')} #{_digest(name)}"


def mask_prefix(prefix: str | Path) -> str:
    """Return the prefix of the loss mask of a dataset."""
    return f"{prefix}_loss_mask"


def output_of(key: str, set_name: str | None) -> str:
    """Return what identifies a dataset among those of a command: its key, and its set if each set has its own."""
    return key if set_name is None else json.dumps([set_name, key])


def file_stem(output: str) -> str:
    """Return a unique file name stem for an output, used within the parts directory."""
    is_safe = re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", output)
    return output if is_safe else f"~{_digest(output, 16)}"


def dataset_names(prefix: str, outputs: Sequence[str], is_split: bool) -> dict[str, str]:
    """Map each output to the prefix of its dataset. Names that would collide, or are too long for a file, get a hash.

    Raises DataError if two names still collide.
    """
    plain = {output: _plain_name(output, is_split) for output in outputs}
    counts = Counter(plain.values())
    exact = Counter(name for output, name in plain.items() if _is_exact(output, is_split))
    names = {}
    for output, name in plain.items():
        is_alone = counts[name] == 1 or (_is_exact(output, is_split) and exact[name] == 1)
        is_plain = not is_split or (len(name) <= _MAX_FILE_NAME and is_alone)
        names[output] = f"{prefix}_{name if is_plain else _hashed(output, name)}_document"
    if len(set(names.values())) < len(names):
        raise DataError(f"two datasets of {prefix} would have the same name: rename a value of --split-by-meta")
    return dict(sorted(names.items(), key=lambda item: item[1]))


def _plain_name(output: str, is_split: bool) -> str:
    if not is_split:
        return output
    name, key = json.loads(output)
    return f"{_UNSAFE.sub('_', name)}_{key}"


def _is_exact(output: str, is_split: bool) -> bool:
    """Return whether a name is used unchanged."""
    if not is_split:
        return True
    name = json.loads(output)[0]
    return bool(name) and _UNSAFE.sub("_", name) == name


def _hashed(output: str, name: str) -> str:
    key = json.loads(output)[1]
    stem = name.removesuffix(f"_{key}")[:_MAX_FILE_NAME]
    return f"{stem}-{_digest(output)}_{key}"


def _digest(text: str, size: int = 4) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=size).hexdigest()
