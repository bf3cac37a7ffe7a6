"""Documents of the rows of inputs: lines of Pile shards here, rows of tables elsewhere; bad ones are counted and
reported, in lines and in bytes."""

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson

from megatron_tf.data.chat_template import ChatTemplate, Conversation
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.messages import BadRowError
from megatron_tf.data.shards import Line, read_lines

MAX_LINE_BYTES = 128 << 20  # bounds memory: as a str, text that is not all ASCII takes up to four times its bytes
BATCH_BYTES = 8 << 20  # of lines
_ABSENT = object()


@dataclass(frozen=True)
class Fields:
    """What is read of each row."""

    keys: tuple[str, ...]
    """Keys that hold text. A key with dots is that key if the row has it; otherwise it leads through objects."""
    set_key: str = "pile_set_name"
    """Key under `meta` whose value names the document's set."""
    chat: ChatTemplate | None = None
    """Makes text of the values under the keys, which are conversations then."""


class Position(NamedTuple):
    """A place between two rows of a source."""

    rows: int = 0
    """Number of rows before it."""
    digest: str | None = None
    """Digest of these rows, where they can't be compared in another way."""


BEGINNING = Position()


@dataclass
class BadLines:
    """Counts of the lines that hold no document, by kind: how many, their bytes, and where the first of each is."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    lines: int = 0
    """Number of lines read, good ones included."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of the bad lines; for a damaged file, its bytes on disk from the damage to the end."""
    shards: dict[str, int] = field(default_factory=dict)
    """Number of files with bad lines of each kind."""

    def add(self, kind: str, *, path: Path | str, line: int, size: int, count: int = 1) -> None:
        """Count bad lines of a kind, of which `line` is the first; `size` is their length in bytes."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.first.setdefault(kind, f"{path}:{line}")
        self.bytes[kind] = self.bytes.get(kind, 0) + size
        self.shards[kind] = 1

    def merge(self, later: "BadLines", of_same_shard: Set[str] = frozenset()) -> None:
        """Add the counts of what was read after this. Files count only once: those of kinds in `of_same_shard` are
        already counted."""
        for kind, count in later.counts.items():
            is_counted = kind in of_same_shard
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.bytes[kind] = self.bytes.get(kind, 0) + later.bytes[kind]
            self.shards[kind] = self.shards.get(kind, 0) + (0 if is_counted else later.shards[kind])
        # keep the earlier one
        self.first = {**later.first, **self.first}
        self.lines += later.lines

    def summary(self) -> str:
        """Format the counts, one line per kind."""
        return "\n".join(
            f"  {n:,} x {kind}, {self.lost(kind)}, the first at {self.first[kind]}" for kind, n in self.counts.items()
        )

    def lost(self, kind: str) -> str:
        """Format the bytes and shards affected by a kind of bad line."""
        return f"{self.bytes[kind]:,} bytes in {self.shards[kind]:,} shards"

    def check(self, allowed_fraction: float) -> None:
        """Raise DataError if more than the allowed fraction of lines is bad."""
        bad = sum(self.counts.values())
        if bad > allowed_fraction * self.lines:
            raise DataError(
                f"{bad} of {self.lines} lines are bad, more than --max-bad-lines {allowed_fraction:g} allows:\n"
                f"{self.summary()}"
            )


@dataclass
class DocumentBatch:
    """Consecutive documents of a file."""

    line_bytes: int = 0
    documents: list[dict[str, Any]] = field(default_factory=list)
    bad: BadLines = field(default_factory=BadLines)
    """Bad lines since the previous batch."""
    end_line: int = 0
    """Number of lines (or rows) of the source up to the end of this batch."""
    end_byte: int = 0
    """Position in the (possibly compressed) source at the end of this batch, in bytes."""
    digest: str | None = None
    """Digest of all lines up to the end of this batch, where the source has one."""

    def count(self, row: dict[str, Any] | str, *, path: Path | str, line: int, size: int) -> None:
        """Add a document, or count a bad line by what is wrong with it; `size` is its length in bytes."""
        self.bad.lines += 1
        if isinstance(row, str):
            self.bad.add(row, path=path, line=line, size=size)
        else:
            self.documents.append(row)
            self.line_bytes += size


class Source(Protocol):
    """What becomes one part: a file, consecutive row groups of one, or a shard of a dataset."""

    @property
    def name(self) -> str:
        """Name in messages."""

    @property
    def size(self) -> int:
        """Bytes on disk, for the progress and the order of work; 0 if that is unknown."""

    @property
    def is_whole(self) -> bool:
        """Whether it is all of an input."""

    def identity(self) -> dict[str, Any]:
        """Return what tells it from other sources, and from itself after a change, as JSON values."""

    def batches(self, fields: Fields, start: Position = BEGINNING) -> Iterator[DocumentBatch]:
        """Yield the documents after a position. Raises DataError for a source that can't be read."""


class Input(Protocol):
    """What the user names: a file, standard input or a dataset."""

    @property
    def name(self) -> str:
        """Name in messages."""

    def identity(self) -> dict[str, Any]:
        """Return what tells it from other inputs, and from itself after a change, as JSON values."""

    def sources(self, fields: Fields) -> Sequence[Source]:
        """Return what it consists of, in order. Raises DataError if it can't be read or lacks a column of `fields`."""


def read_batches(
    path: Path, keys: Sequence[str], first_line: int = 0, chat: ChatTemplate | None = None
) -> Iterator[DocumentBatch]:
    """Yield the documents of a file, starting at a line: JSON objects whose `keys` all hold text, or conversations for
    the template `chat`. Other lines count as bad.

    Raises DataError for a file that can't be read or whose format does not match its name.
    """
    yield from batches_of_lines(read_lines(path, MAX_LINE_BYTES), keys, name=path, first_line=first_line, chat=chat)


def batches_of_lines(
    lines: Iterable[Line],
    keys: Sequence[str],
    *,
    name: Path | str,
    first_line: int,
    chat: ChatTemplate | None = None,
) -> Iterator[DocumentBatch]:
    """Yield the documents of lines, as `read_batches` does; `name` is that of their source in messages."""
    batch = DocumentBatch()
    for number, line, size, is_ended, position in lines:
        batch.end_line = number
        batch.end_byte = position
        if number <= first_line or (isinstance(line, bytes) and not line.strip()):
            continue
        with naming(name, number):
            document = line if isinstance(line, str) else _parse(line, keys, chat)
        if document == "malformed JSON" and not is_ended:
            document = "truncated last line"
        batch.count(document, path=name, line=number, size=size)
        if batch.line_bytes >= BATCH_BYTES:
            yield batch
            batch = DocumentBatch(end_line=number, end_byte=position)
    yield batch


def documents_of(inputs: Iterable[Input], keys: Sequence[str], bad: BadLines) -> Iterator[dict[str, Any]]:
    """Yield the documents of several inputs in order; bad lines are added to `bad`.

    Raises as `read_batches` does, and DataError after an input without any document.
    """
    fields = Fields(tuple(keys))
    for each in inputs:
        documents = 0
        bad_here = BadLines()
        for batch in chain.from_iterable(source.batches(fields) for source in each.sources(fields)):
            documents += len(batch.documents)
            kinds = set(bad_here.counts)
            for counted in (bad_here, bad):
                counted.merge(batch.bad, kinds)
            yield from batch.documents
        check_any(each.name, documents, bad_here)


@contextmanager
def naming(name: Path | str, row: int) -> Iterator[None]:
    """Put the place of a row before the message of a DataError within the context."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}:{row}: {error}") from error


def check_any(name: str, documents: int, bad: BadLines) -> None:
    """Raise DataError if an input has no document, whatever fraction of bad lines is allowed: it must not be lost
    silently."""
    if documents:
        return
    kinds = ", ".join(f"{n:,} x {kind}" for kind, n in bad.counts.items())
    found = f"{bad.lines:,} lines, {sum(bad.bytes.values()):,} bytes ({kinds})" if kinds else "it is empty"
    raise DataError(f"no document in {name}: {found}: remove it from the inputs, fix it, or give the key of its text")


def _parse(line: bytes, keys: Sequence[str], chat: ChatTemplate | None) -> dict[str, Any] | str:
    """Parse a line into its document, or return what is wrong with it."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            document = json.loads(line)  # accepts NaN, infinities, byte order marks and lone surrogates
        except UnicodeDecodeError:
            return "invalid UTF-8"
        except (ValueError, RecursionError):
            return "malformed JSON"
    if not isinstance(document, dict):
        return "not a JSON object"
    return checked(document, keys, chat)


def checked(row: dict[str, Any], keys: Sequence[str], chat: ChatTemplate | None = None) -> dict[str, Any] | str:
    """Return a row whose `keys` all hold text, or what is wrong with it. Nested text is put under its whole key too.

    With a template the values are conversations, and become `Conversation`s. Raises DataError for a template that does
    not tell where the answers are.
    """
    for key in keys:
        value = row[key] if key in row else _nested(row, key)
        if value is _ABSENT:
            return f"no key {key!r}"
        if chat is not None:
            try:
                value = chat.conversation(value)
            except BadRowError as error:
                return f"{key!r}: {error}"
        elif not isinstance(value, str):
            return f"{key!r} is not a text"
        text = text_of(value)
        if not text.isascii() and not _is_encodable(text):
            return f"{key!r} has a lone surrogate"
        row[key] = value
    return row


def text_of(value: str | Conversation) -> str:
    """Return the text of a document."""
    return value if isinstance(value, str) else value.text


def _nested(row: dict[str, Any], key: str) -> Any:
    """Return the value that a key with dots leads to, or _ABSENT."""
    value: Any = row
    for name in key.split("."):
        value = value.get(name, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value


def utf8_size(text: str) -> int:
    """Return the bytes of a text."""
    return len(text) if text.isascii() else len(text.encode())


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
