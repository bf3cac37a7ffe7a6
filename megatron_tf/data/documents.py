"""Documents from the lines of Pile shards; what is odd is counted in lines and in bytes, and shown."""

import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.shards import read_lines

MAX_LINE_BYTES = 128 << 20  # bounds memory: a text of it takes up to four times as much when it is not all ASCII
BATCH_BYTES = 8 << 20  # of lines


@dataclass
class BadLines:
    """Lines that are no documents: how many of each kind, their bytes, and where the first of each is."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    lines: int = 0
    """Lines read, good ones included."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Of a damaged file, those on disk from the damage to its end."""
    shards: dict[str, int] = field(default_factory=dict)
    """Files with such lines."""

    def add(self, kind: str, *, path: Path, line: int, size: int) -> None:
        """Count one."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, f"{path}:{line}")
        self.bytes[kind] = self.bytes.get(kind, 0) + size
        self.shards[kind] = 1

    def merge(self, later: "BadLines", of_same_shard: Set[str] = frozenset()) -> None:
        """Count those of what was read after this; a file is counted already for the kinds `of_same_shard`."""
        for kind, count in later.counts.items():
            is_counted = kind in of_same_shard
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.bytes[kind] = self.bytes.get(kind, 0) + later.bytes[kind]
            self.shards[kind] = self.shards.get(kind, 0) + (0 if is_counted else later.shards[kind])
        # the earlier one stays
        self.first = {**later.first, **self.first}
        self.lines += later.lines

    def summary(self) -> str:
        """One line a kind."""
        return "\n".join(
            f"  {n:,} x {kind}, {self.lost(kind)}, the first at {self.first[kind]}" for kind, n in self.counts.items()
        )

    def lost(self, kind: str) -> str:
        """How much that is."""
        return f"{self.bytes[kind]:,} bytes in {self.shards[kind]:,} shards"

    def check(self, allowed_fraction: float) -> None:
        """Raise DataError where more than the allowed fraction of lines is bad."""
        bad = sum(self.counts.values())
        if bad > allowed_fraction * self.lines:
            raise DataError(
                f"{bad} of {self.lines} lines are bad, more than --max-bad-lines {allowed_fraction:g} allows:\n"
                f"{self.summary()}"
            )


@dataclass
class DocumentBatch:
    """Documents that follow one another in a file."""

    line_bytes: int = 0
    documents: list[dict[str, Any]] = field(default_factory=list)
    bad: BadLines = field(default_factory=BadLines)
    """Of the lines since the batch before."""
    end_line: int = 0
    """Lines of the file up to the end of this batch."""
    end_byte: int = 0
    """Position in the file, compressed as it is, by the end of this batch."""


def read_batches(path: Path, keys: Sequence[str], first_line: int = 0) -> Iterator[DocumentBatch]:
    """The documents of a file whose `keys` are all texts, from a line on; other lines are counted as bad.

    Raises DataError for a file that can't be read, or is not of the format that its name says.
    """
    batch = DocumentBatch()
    for number, line, size, is_ended, position in read_lines(path, MAX_LINE_BYTES):
        batch.end_line = number
        batch.end_byte = position
        if number <= first_line or (isinstance(line, bytes) and not line.strip()):
            continue
        batch.bad.lines += 1
        document = line if isinstance(line, str) else _parse(line, keys)
        if document == "malformed JSON" and not is_ended:
            document = "truncated last line"
        if isinstance(document, str):
            batch.bad.add(document, path=path, line=number, size=size)
        else:
            batch.documents.append(document)
            batch.line_bytes += size
        if batch.line_bytes >= BATCH_BYTES:
            yield batch
            batch = DocumentBatch()
    yield batch


def documents_of(paths: Sequence[Path], keys: Sequence[str], bad: BadLines) -> Iterator[dict[str, Any]]:
    """The documents of files one after another; bad lines go to `bad`.

    Raises as `read_batches` does, and DataError after a file without a document.
    """
    for path in paths:
        documents = 0
        bad_here = BadLines()
        for batch in read_batches(path, keys):
            documents += len(batch.documents)
            kinds = set(bad_here.counts)
            for counted in (bad_here, bad):
                counted.merge(batch.bad, kinds)
            yield from batch.documents
        check_any(path, documents, bad_here)


def check_any(path: Path, documents: int, bad: BadLines) -> None:
    """Raise DataError where a file has no document: so much is never lost without a word, however much others hold."""
    if documents:
        return
    kinds = ", ".join(f"{n:,} x {kind}" for kind, n in bad.counts.items())
    found = f"{bad.lines:,} lines, {sum(bad.bytes.values()):,} bytes ({kinds})" if kinds else "it is empty"
    raise DataError(f"no document in {path}: {found}: leave it out, fix it, or name the key of its text")


def _parse(line: bytes, keys: Sequence[str]) -> dict[str, Any] | str:
    """The document of a line, or what is wrong with it."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            document = json.loads(line)  # knows NaN, infinite numbers, byte order marks and lone surrogates
        except UnicodeDecodeError:
            return "invalid UTF-8"
        except (ValueError, RecursionError):
            return "malformed JSON"
    if not isinstance(document, dict):
        return "not a JSON object"
    for key in keys:
        if key not in document:
            return f"no key {key!r}"
        text = document[key]
        if not isinstance(text, str):
            return f"{key!r} is not a text"
        if not text.isascii() and not _is_encodable(text):
            return f"{key!r} has a lone surrogate"
    return document


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
