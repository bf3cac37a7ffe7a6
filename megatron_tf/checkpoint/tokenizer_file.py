"""Copies of the tokenizer's files in a checkpoint, in a hidden directory that readers of every version ignore."""

from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.files import write_durably
from megatron_tf.tokenizer_files import NAMING_FILES, digest_of, parts_of

STORED = ".tokenizer"
"""Name of the directory; a file in it is only used if it has the hash in the checkpoint's record."""


def find_tokenizer(record: RunRecord, directory: Path | None) -> Path | None:
    """Return the file that the model was trained with: the run's own path, or the copy in the checkpoint `directory`.

    If neither has the right contents, returns the path that the run used, which may be None.
    """
    recorded = _recorded(record)
    if recorded is None:
        return None
    stored = [] if directory is None else [directory / STORED / recorded.name]
    right = (path for path in (recorded, *stored) if _has_hash(path, record.tokenizer.get("sha256")))
    return next(right, recorded)


def store_tokenizer(record: RunRecord, source: Path | None, target: Path) -> None:
    """Copy the tokenizer's file, and those that belong to it, into the checkpoint being written at `target`; `source`
    is the checkpoint it is made from, if any. A file that has been moved or changed is not copied.
    """
    path = find_tokenizer(record, source)
    if path is None or not _has_hash(path, record.tokenizer.get("sha256")):
        return
    (target / STORED).mkdir()
    naming = [path.with_name(name) for name in NAMING_FILES] if path.suffix == ".json" else []
    for each in (*parts_of(path), *(file for file in naming if file.is_file())):
        write_durably(target / STORED / each.name, each.read_bytes())


def _recorded(record: RunRecord) -> Path | None:
    if record.data.get("tokenizer_type") == "NullTokenizer":  # a run of an earlier version may name a file
        return None
    name = record.data.get("tokenizer_model")
    return Path(name) if isinstance(name, str) and name else None


def _has_hash(path: Path, sha256: Any) -> bool:
    try:
        return path.is_file() and digest_of(path) == sha256
    except OSError:
        return False
