"""Documents of the rows of tables: what Parquet and Arrow files have in common."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from megatron_tf.data import documents
from megatron_tf.data.chat_template import ChatTemplate
from megatron_tf.data.documents import BadLines, DocumentBatch, Fields, check_any, naming
from megatron_tf.data.formats import HEAD_BYTES, check_format
from megatron_tf.data.indexed_dataset import DataError

SOURCE_BYTES = 256 << 20  # row groups or record batches of at least this size are distributed together
_BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


class Chunk(NamedTuple):
    """Consecutive rows of a source, or rows that are lost."""

    first: int
    """Number of rows of the source before these."""
    position: int
    """Bytes of the source on disk up to their end."""
    rows: pa.RecordBatch | None
    problem: str = ""
    """Why they are lost."""
    lost_rows: int = 0
    lost_bytes: int = 0
    """Their bytes on disk."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that fields are in, as paths through its structs."""

    texts: dict[str, tuple[str, ...]]
    """Key -> path."""
    set_path: tuple[str, ...] | None
    """None if documents don't name their sets."""
    set_key: str
    chat: ChatTemplate | None = None
    """Set if the columns of `texts` hold conversations."""

    @property
    def paths(self) -> list[tuple[str, ...]]:
        """All paths to read, without repetition."""
        found = [*self.texts.values(), *([] if self.set_path is None else [self.set_path])]
        return list(dict.fromkeys(found))


def checked_head(path: Path, expected: str) -> bytes:
    """Return the first bytes of a file. Raises DataError if it is empty or does not have the `expected` format."""
    with path.open("rb") as raw:
        head = raw.read(HEAD_BYTES)
    if not head:
        check_any(str(path), 0, BadLines())
    check_format(path, head, expected)
    return head


def find_columns(schema: pa.Schema, fields: Fields, path: Path) -> Columns:
    """Find the columns of fields in a file's schema. Raises DataError for a key without a column of text."""
    texts = {}
    for key in fields.keys:
        found = (key,) if _type_at(schema, (key,)) is not None else tuple(key.split("."))
        kind = _type_at(schema, found)
        if kind is None:
            names = ", ".join(map(str, schema.names)) or "none"
            raise DataError(f"{path} has no column {key!r}, but: {names}: give the column of its text as --json-keys")
        if fields.chat is None and not _is_text(kind):
            raise DataError(f"{path}: column {key!r} is {kind}, not text: give the column of its text as --json-keys")
        if fields.chat is not None and not _is_list(kind):
            raise DataError(
                f"{path}: column {key!r} is {kind}, not a list of messages: give the column of the conversations as "
                f"--json-keys"
            )
        texts[key] = found
    set_path = ("meta", fields.set_key)
    known = set_path if _type_at(schema, set_path) is not None else None
    return Columns(texts=texts, set_path=known, set_key=fields.set_key, chat=fields.chat)


def _type_at(schema: pa.Schema, path: Sequence[str]) -> pa.DataType | None:
    """Return the type of a column, or of a field of its structs; None if there is none, or several of one name."""
    parent: Any = schema
    for name in path:
        index = parent.get_field_index(name) if parent is schema or pa.types.is_struct(parent) else -1
        if index < 0:
            return None
        parent = parent.field(index).type
    return parent


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def column_at(rows: pa.RecordBatch, path: Sequence[str]) -> pa.Array:
    """Return a column, or a field of its structs: null wherever one of these is."""
    column = rows.column(rows.schema.get_field_index(path[0]))
    return pc.struct_field(column, list(path[1:])) if len(path) > 1 else column


def check_rows(rows: pa.RecordBatch, columns: Columns) -> None:
    """Raise ArrowInvalid if rows of an untrusted file refer to bytes outside of them; pyarrow itself would crash."""
    rows.validate()
    for path in columns.paths:
        column = column_at(rows, path)
        # as bytes: text that is not UTF-8 is a bad row, not a damaged file
        (column.view(_BINARY[column.type]) if column.type in _BINARY else column).validate(full=True)


def batches_of_chunks(
    chunks: Iterator[Chunk], columns: Columns, *, name: Path | str, start_row: int, rows_before: int
) -> Iterator[DocumentBatch]:
    """Yield the documents of chunks from row `start_row` on: rows whose columns all hold text. Others count as bad.

    `rows_before` are the rows of the file before the source, which messages count too.
    """
    batch = DocumentBatch()
    for chunk in chunks:
        place = rows_before + chunk.first + 1
        if chunk.rows is None:
            batch.end_line = chunk.first + chunk.lost_rows
            if batch.end_line > start_row:
                batch.bad.lines += chunk.lost_rows
                batch.bad.add(chunk.problem, path=name, line=place, size=chunk.lost_bytes, count=chunk.lost_rows)
            batch.end_byte = chunk.position
            continue
        skip = max(0, start_row - chunk.first)
        read = _reader(chunk.rows, columns)
        for row in range(skip, chunk.rows.num_rows):
            with naming(name, place + row):
                document, size = read(row)
            batch.count(document, path=name, line=place + row, size=size)
            batch.end_line = chunk.first + row + 1
            if batch.line_bytes >= documents.BATCH_BYTES:
                yield batch
                batch = DocumentBatch(end_line=batch.end_line, end_byte=batch.end_byte)
        batch.end_line = chunk.first + chunk.rows.num_rows
        batch.end_byte = chunk.position
    yield batch


def _reader(rows: pa.RecordBatch, columns: Columns) -> Callable[[int], tuple[dict[str, Any] | str, int]]:
    """Return a function from the number of a row to (document or what is wrong with it, bytes of its text)."""
    texts = {key: _plain(column_at(rows, path)) for key, path in columns.texts.items()}
    sets = None if columns.set_path is None else column_at(rows, columns.set_path)
    chat = columns.chat

    def read(row: int) -> tuple[dict[str, Any] | str, int]:
        if chat is None:
            document, size = _document({key: column[row].as_buffer() for key, column in texts.items()})
        else:
            document, size = _conversations({key: column[row] for key, column in texts.items()}, chat)
        if sets is not None and isinstance(document, dict) and sets[row].is_valid:
            document["meta"] = {columns.set_key: sets[row].as_py()}
        return document, size

    return read


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _document(texts: dict[str, pa.Buffer | None]) -> tuple[dict[str, Any] | str, int]:
    """Decode the bytes of a row's texts; return what is wrong with it otherwise, and their size."""
    size = sum(text.size for text in texts.values() if text is not None)
    if size > documents.MAX_LINE_BYTES:
        return f"longer than {documents.MAX_LINE_BYTES >> 20} MiB", size
    document: dict[str, Any] = {}
    for key, text in texts.items():
        if text is None:
            return f"{key!r} is not a text", size
        try:
            document[key] = str(text, "utf-8")
        except UnicodeDecodeError:
            return "invalid UTF-8", size
    return document, size


def _conversations(values: dict[str, pa.Scalar], chat: ChatTemplate) -> tuple[dict[str, Any] | str, int]:
    """Render a row's conversations; return what is wrong with it otherwise, and the bytes of their text."""
    try:
        document = documents.checked({key: value.as_py() for key, value in values.items()}, list(values), chat)
    except UnicodeDecodeError:
        return "invalid UTF-8", 0
    if isinstance(document, str):
        return document, 0
    return document, sum(documents.utf8_size(documents.text_of(document[key])) for key in values)


def is_damage(error: Exception) -> bool:
    """Return whether an error comes from the contents of a file, rather than from the system or from pyarrow."""
    return isinstance(error, pa.ArrowInvalid) or (isinstance(error, OSError) and error.errno is None)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise DataError, which names the file, for all errors of the system and of pyarrow within the context."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        if is_damage(error):
            raise DataError(
                f"{path} is damaged or truncated ({reason}): restore it, or remove it from the inputs"
            ) from error
        raise DataError(f"{path} can't be read ({reason}): make it readable and run the same command again") from error
