"""Reads Arrow files a record batch at a time.

There are two formats. The batches of one with a footer are distributed to ranks as files are. The other is a stream,
which Hugging Face's `datasets` writes, and is read from its beginning.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from megatron_tf.data import columns as tables
from megatron_tf.data.columns import (
    Chunk,
    Columns,
    batches_of_chunks,
    check_rows,
    checked_head,
    find_columns,
    is_damage,
    reading,
)
from megatron_tf.data.documents import BEGINNING, DocumentBatch, Fields, Position
from megatron_tf.data.formats import ARROW
from megatron_tf.data.inputs import FileInput, identity_of_file

_FILE_MAGIC = b"ARROW1"
DAMAGED = "damaged record batch"


@dataclass(frozen=True)
class ArrowInput(FileInput):
    """An Arrow file, in the file or the stream format."""

    def sources(self, fields: Fields) -> Sequence["RecordBatches"]:
        """Divide the file into consecutive record batches of about SOURCE_BYTES on disk; a stream is not divided.

        Raises DataError if it can't be read, is not Arrow, or has no column of text for a key.
        """
        with reading(self.path), _open(self.path, fields) as file:
            count = None if file.is_stream else file.reader.num_record_batches
        size = self.path.stat().st_size
        if count is None:
            return [RecordBatches(self.path, first=0, stop=None, size=size, is_whole=True)]
        length = max(1, tables.SOURCE_BYTES * count // max(1, size))
        starts = range(0, max(1, count), length)
        return [
            RecordBatches(
                self.path,
                first=first,
                stop=min(count, first + length),
                size=_place(first + length, count, size) - _place(first, count, size),
                is_whole=len(starts) == 1,
            )
            for first in starts
        ]


def _place(number: int, count: int, size: int) -> int:
    """Return where a record batch would start if all were of the same size."""
    return size * min(number, count) // max(1, count)


@dataclass(frozen=True)
class RecordBatches:
    """Consecutive record batches of an Arrow file."""

    path: Path
    first: int
    stop: int | None
    """None for a stream, which is read to its end."""
    size: int
    """Their share of the bytes of the file, by number."""
    is_whole: bool

    @property
    def name(self) -> str:
        """Name in messages."""
        return str(self.path) if self.is_whole else f"{self.path}, from record batch {self.first}"

    def identity(self) -> dict[str, Any]:
        """Return what identifies the file, and which of its record batches these are."""
        return {**identity_of_file(self.path), "record_batches": [self.first, self.stop]}

    def batches(self, fields: Fields, start: Position = BEGINNING) -> Iterator[DocumentBatch]:
        """Yield the documents after a position. A damaged record batch counts as one bad row, and ends a stream.

        Raises DataError if the system can't read the file.
        """
        with reading(self.path), _open(self.path, fields) as file:
            chunks = self._of_stream(file) if file.is_stream else self._of_file(file)
            yield from batches_of_chunks(chunks, file.columns, name=self.name, start_row=start.rows, rows_before=0)

    def _of_file(self, file: "_File") -> Iterator[Chunk]:
        # the rows of a damaged batch are not known: it takes the place of one
        before = 0
        numbers = range(self.first, file.reader.num_record_batches if self.stop is None else self.stop)
        for done, number in enumerate(numbers, 1):
            position = _place(done, len(numbers), self.size)
            try:
                rows = file.reader.get_batch(number)
                check_rows(rows, file.columns)
            except (pa.ArrowInvalid, OSError) as error:
                if not is_damage(error):
                    raise
                rows, lost = None, position - _place(done - 1, len(numbers), self.size)
                yield Chunk(before, position, None, problem=DAMAGED, lost_rows=1, lost_bytes=lost)
            else:
                yield Chunk(before, position, rows)
            before += 1 if rows is None else rows.num_rows

    def _of_stream(self, file: "_File") -> Iterator[Chunk]:
        before = start = 0
        while True:
            try:
                rows = file.reader.read_next_batch()
                check_rows(rows, file.columns)
            except StopIteration:
                return
            except (pa.ArrowInvalid, OSError) as error:
                if not is_damage(error):
                    raise
                yield Chunk(before, self.size, None, problem=DAMAGED, lost_rows=1, lost_bytes=self.size - start)
                return
            start = file.source.tell()
            yield Chunk(before, start, rows)
            before += rows.num_rows


class _File(NamedTuple):
    reader: Any
    """Of pyarrow, for a file or a stream."""
    source: pa.NativeFile
    is_stream: bool
    columns: Columns


@contextmanager
def _open(path: Path, fields: Fields) -> Iterator[_File]:
    """Open a file of which only the columns of `fields` are read, or a stream.

    It is not mapped into memory: a bad disk, or a file that is truncated meanwhile, would end the process without a
    message. Raises DataError if it is not Arrow, or lacks a column.
    """
    head = checked_head(path, ARROW)
    with pa.OSFile(str(path)) as source:
        is_stream = not head.startswith(_FILE_MAGIC)
        reader = pa.ipc.open_stream(source) if is_stream else pa.ipc.open_file(source)
        columns = find_columns(reader.schema, fields, path)
        if not is_stream:
            numbers = sorted({reader.schema.get_field_index(found[0]) for found in columns.paths})
            reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=numbers, use_threads=False))
        yield _File(reader, source=source, is_stream=is_stream, columns=columns)
