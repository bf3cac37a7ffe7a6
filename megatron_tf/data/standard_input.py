"""Reads standard input; whether a resumed command gets the same lines again is checked by their digest."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from megatron_tf.data import documents
from megatron_tf.data.documents import BEGINNING, DocumentBatch, Fields, Position, Source, batches_of_lines
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.shards import Line, read_stream

STANDARD_INPUT = "-"
_NAME = "standard input"


@dataclass(frozen=True)
class StandardInput:
    """JSON lines on standard input; it is also its only source."""

    name = _NAME
    size = 0
    is_whole = True

    def identity(self) -> dict[str, Any]:
        """Return its name; a digest of its lines is only known after they have been read."""
        return {"input": STANDARD_INPUT}

    def sources(self, fields: Fields) -> Sequence[Source]:
        """Return itself."""
        return [self]

    def batches(self, fields: Fields, start: Position = BEGINNING) -> Iterator[DocumentBatch]:
        """Yield the documents after a position, with the digest of all lines so far.

        Raises DataError if it can't be read, or if its lines up to `start` differ from those that were read before.
        """
        lines = _Digested(_lines(), start)
        batches = batches_of_lines(lines, fields.keys, name=self.name, first_line=start.rows, chat=fields.chat)
        for batch in batches:
            batch.digest = lines.digest()
            yield batch

    def check(self, end: Position) -> None:
        """Read it to its end. Raises DataError unless its lines are exactly those up to `end`."""
        lines = _Digested(_lines(), end)
        if any(line.number > end.rows for line in lines):
            raise _differs(f"it has more than {end.rows:,} lines")


class _Digested(Iterator[Line]):
    """Computes a digest of the lines that are read through it, and compares it at `start`."""

    def __init__(self, lines: Iterator[Line], start: Position) -> None:
        self._lines = lines
        self._start = start
        self._seen = 0
        self._hash = xxhash.xxh3_128()

    def __next__(self) -> Line:
        line = next(self._lines, None)
        if line is None:
            if self._seen < self._start.rows:
                raise _differs(f"it ends after {self._seen:,} lines")
            raise StopIteration
        # of a line that is too long, only the size is known
        self._hash.update(line.content if isinstance(line.content, bytes) else b"%d" % line.size)
        self._hash.update(b"\n" if line.is_ended else b"")
        self._seen = line.number
        if self._seen == self._start.rows and self.digest() != self._start.digest:
            raise _differs(f"its first {self._seen:,} lines are others")
        return line

    def digest(self) -> str:
        return self._hash.hexdigest()


def _differs(how: str) -> DataError:
    return DataError(
        f"{_NAME} differs from what an earlier command read for this prefix ({how}): pipe the same lines, or choose "
        f"another --output-prefix"
    )


def _lines() -> Iterator[Line]:
    """Yield the lines of standard input. Raises DataError if there is nothing to read from."""
    if sys.stdin is None:  # it was closed at the start, and its descriptor may be that of another file by now
        raise DataError(f"{_NAME} is closed: pipe JSON lines to this command, or name files as --input")
    with open(0, "rb", closefd=False) as raw:
        if raw.isatty():
            raise DataError(f"{_NAME} is a terminal: pipe JSON lines to this command, or name files as --input")
        yield from read_stream(raw, _NAME, documents.MAX_LINE_BYTES)
