"""Documents from Pile shards: .jsonl, .jsonl.gz and .jsonl.zst, streamed; what is odd is counted and shown."""

import gzip
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard

from megatron_tf.data.indexed_dataset import DataError


@dataclass
class BadLines:
    """Lines that are no documents: how many of each kind, and where the first of each is."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    lines: int = 0
    """Lines read, good ones included."""

    def add(self, kind: str, path: Path, line: int) -> None:
        """Count one."""
        self.counts[kind] += 1
        self.first.setdefault(kind, f"{path}:{line}")

    def summary(self) -> str:
        """One line a kind."""
        return "\n".join(f"  {n} x {kind}, the first at {self.first[kind]}" for kind, n in self.counts.items())

    def check(self, allowed_fraction: float) -> None:
        """Raise DataError where more than the allowed fraction of lines is bad."""
        bad = self.counts.total()
        if bad > allowed_fraction * self.lines:
            raise DataError(
                f"{bad} of {self.lines} lines are bad, more than --max-bad-lines {allowed_fraction:g} allows:\n"
                f"{self.summary()}"
            )


def read_documents(paths: Sequence[Path], keys: Sequence[str], bad: BadLines) -> Iterator[dict[str, Any]]:
    """The JSON object of each line whose `keys` are all texts; other lines go to `bad`.

    Raises DataError for a file that is missing or of an unknown kind.
    """
    for path in paths:
        try:
            with _open(path) as stream:
                yield from _documents_of(path, stream, keys, bad)
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None


def _documents_of(path: Path, stream: BinaryIO, keys: Sequence[str], bad: BadLines) -> Iterator[dict[str, Any]]:
    number = 0
    lines = iter(stream)
    while True:
        try:
            line = next(lines, None)
        except (zstandard.ZstdError, EOFError, OSError) as error:
            bad.lines += 1
            bad.add(f"damaged or truncated compression ({error})", path, number + 1)
            return
        if line is None:
            return
        number += 1
        if not line.strip():
            continue
        bad.lines += 1
        fault, document = _parse(line, keys)
        if fault:
            bad.add(fault, path, number)
        else:
            yield document


def _parse(line: bytes, keys: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            line.decode()
        except UnicodeDecodeError:
            return "invalid UTF-8", {}
        return ("malformed JSON" if line.endswith(b"\n") else "truncated last line"), {}
    if not isinstance(document, dict):
        return "not a JSON object", {}
    for key in keys:
        if key not in document:
            return f"no key {key!r}", {}
        if not isinstance(document[key], str):
            return f"{key!r} is not a text", {}
    return None, document


def _open(path: Path) -> BinaryIO:
    if path.name.endswith(".zst"):
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(
            path.open("rb"), read_across_frames=True, closefd=True
        )
        return io.BufferedReader(reader, 1 << 20)
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.name.endswith(".jsonl"):
        return path.open("rb")
    raise DataError(f"{path}: inputs end in .jsonl, .jsonl.gz or .jsonl.zst")
