"""Documents from Pile shards: .jsonl, .jsonl.gz and .jsonl.zst, streamed; what is odd is counted and shown."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
from backports import zstd

from megatron_tf.data.indexed_dataset import DataError

MAX_LINE_BYTES = 128 << 20  # bounds memory: a text of it takes up to four times as much when it is not all ASCII
BATCH_BYTES = 8 << 20  # of lines
_READ_BYTES = 1 << 20
_ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}  # the Pile's frames have long windows


@dataclass
class BadLines:
    """Lines that are no documents: how many of each kind, and where the first of each is."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    lines: int = 0
    """Lines read, good ones included."""

    def add(self, kind: str, path: Path, line: int) -> None:
        """Count one."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, f"{path}:{line}")

    def merge(self, later: "BadLines") -> None:
        """Count those of what was read after this."""
        for kind, count in later.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
        self.first = {**later.first, **self.first}
        self.lines += later.lines

    def summary(self) -> str:
        """One line a kind."""
        return "\n".join(f"  {n} x {kind}, the first at {self.first[kind]}" for kind, n in self.counts.items())

    def check(self, allowed_fraction: float) -> None:
        """Raise DataError where more than the allowed fraction of lines is bad."""
        bad = sum(self.counts.values())
        if bad > allowed_fraction * self.lines:
            raise DataError(
                f"{bad} of {self.lines} lines are bad, more than --max-bad-lines {allowed_fraction:g} allows:\n"
                f"{self.summary()}"
            )


@dataclass
class Batch:
    """Documents that follow one another in a file."""

    line_bytes: int = 0
    documents: list[dict[str, Any]] = field(default_factory=list)
    bad: BadLines = field(default_factory=BadLines)
    """Of the lines since the batch before."""
    end_line: int = 0
    """Lines of the file up to the end of this batch."""
    end_byte: int = 0
    """Position in the file, compressed as it is, by the end of this batch."""


def read_batches(path: Path, keys: Sequence[str], first_line: int = 0) -> Iterator[Batch]:
    """The documents of a file whose `keys` are all texts, from a line on; other lines are counted as bad.

    Raises DataError for a file that is missing or of an unknown kind.
    """
    batch = Batch()
    for number, line, is_ended, position in _read_lines(path):
        batch.end_line, batch.end_byte = number, position
        if number <= first_line or (isinstance(line, bytes) and not line.strip()):
            continue
        batch.bad.lines += 1
        document = line if isinstance(line, str) else _parse(line, keys)
        if document == "malformed JSON" and not is_ended:
            document = "truncated last line"
        if isinstance(document, str):
            batch.bad.add(document, path, number)
        else:
            batch.documents.append(document)
            batch.line_bytes += len(line)
        if batch.line_bytes >= BATCH_BYTES:
            yield batch
            batch = Batch()
    yield batch


def read_documents(paths: Sequence[Path], keys: Sequence[str], bad: BadLines) -> Iterator[dict[str, Any]]:
    """The documents of files one after another; bad lines go to `bad`. Raises as `read_batches` does."""
    for path in paths:
        for batch in read_batches(path, keys):
            bad.merge(batch.bad)
            yield from batch.documents


def _read_lines(path: Path) -> Iterator[tuple[int, bytes | str, bool, int]]:
    """(number, line or what is wrong with it, whether it has its end, bytes of the file read) of each line."""
    number = 0
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as stream:
            for line, is_ended in _split_lines(stream):
                number += 1
                yield number, line, is_ended, raw.tell()
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (zstd.ZstdError, zlib.error, EOFError, OSError) as error:
        yield number + 1, f"damaged or truncated file ({error})", False, path.stat().st_size


def _split_lines(stream: BinaryIO) -> Iterator[tuple[bytes | str, bool]]:
    parts: list[bytes] = []  # of a line that reaches beyond a block
    size = 0
    while block := stream.read(_READ_BYTES):
        *ended, rest = block.split(b"\n")
        for end in ended:
            parts.append(end)
            yield _joined(parts, size + len(end)), True
            parts, size = [], 0
        size += len(rest)
        if size <= MAX_LINE_BYTES:
            parts.append(rest)
    if size:
        yield _joined(parts, size), False


def _joined(parts: list[bytes], size: int) -> bytes | str:
    return b"".join(parts) if size <= MAX_LINE_BYTES else f"longer than {MAX_LINE_BYTES >> 20} MiB"


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


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.name.endswith(".zst"):
        return cast(BinaryIO, zstd.ZstdFile(raw, options=_ZSTD_OPTIONS))
    if path.name.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.name.endswith(".jsonl"):
        return raw
    raise DataError(f"{path}: inputs end in .jsonl, .jsonl.gz or .jsonl.zst")
