"""Reads Parquet files a few rows at a time; row groups are distributed to ranks as files are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_tf.data import columns as tables
from megatron_tf.data import documents
from megatron_tf.data.columns import Chunk, Columns, batches_of_chunks, checked_head, find_columns, is_damage, reading
from megatron_tf.data.documents import BEGINNING, DocumentBatch, Fields, Position
from megatron_tf.data.formats import PARQUET
from megatron_tf.data.inputs import FileInput, identity_of_file

_BUFFER_BYTES = 1 << 20  # of a column chunk, instead of all of it
_MAX_ROWS = 512  # per read: dictionary encoding can hide that rows are large
DAMAGED = "damaged row group"


@dataclass(frozen=True)
class ParquetInput(FileInput):
    """A Parquet file."""

    def sources(self, fields: Fields) -> Sequence["RowGroups"]:
        """Divide the file into consecutive row groups of at least SOURCE_BYTES, uncompressed.

        Raises DataError if it can't be read, is not Parquet, or has no column of text for a key.
        """
        with reading(self.path), _open(self.path) as file:
            columns = find_columns(file.schema_arrow, fields, self.path)
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            bounds = _bounds([_text_bytes(group, columns) for group in groups])
            rows = [0, *accumulate(group.num_rows for group in groups)]
        size = self.path.stat().st_size
        places = [size * before // max(1, rows[-1]) for before in rows[:-1]] + [size]
        return [
            RowGroups(
                self.path,
                first=first,
                stop=stop,
                size=places[stop] - places[first],
                rows_before=rows[first],
                is_whole=len(bounds) == 1,
            )
            for first, stop in bounds
        ]


def _bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Divide consecutive sizes into ranges that sum to SOURCE_BYTES or more, except for the last one."""
    bounds, first, total = [], 0, 0
    for number, size in enumerate(sizes):
        total += size
        if total >= tables.SOURCE_BYTES or number == len(sizes) - 1:
            bounds.append((first, number + 1))
            first, total = number + 1, 0
    return bounds or [(0, 0)]


@dataclass(frozen=True)
class RowGroups:
    """Consecutive row groups of a Parquet file."""

    path: Path
    first: int
    stop: int
    size: int
    """Their share of the bytes of the file, by rows."""
    rows_before: int
    """Number of rows in the row groups before."""
    is_whole: bool

    @property
    def name(self) -> str:
        """Name in messages."""
        return str(self.path) if self.is_whole else f"{self.path}, row groups {self.first} to {self.stop - 1}"

    def identity(self) -> dict[str, Any]:
        """Return what identifies the file, and which of its row groups these are."""
        return {**identity_of_file(self.path), "row_groups": [self.first, self.stop]}

    def batches(self, fields: Fields, start: Position = BEGINNING) -> Iterator[DocumentBatch]:
        """Yield the documents after a position, without reading the row groups before it.

        Rows before a damaged page are kept; the others of its row group count as bad, and the next group is read.
        Raises DataError if the system can't read the file.
        """
        with reading(self.path), _open(self.path) as file:
            columns = find_columns(file.schema_arrow, fields, self.path)
            yield from batches_of_chunks(
                self._chunks(file, columns, start.rows),
                columns,
                name=self.path,
                start_row=start.rows,
                rows_before=self.rows_before,
            )

    def _chunks(self, file: pq.ParquetFile, columns: Columns, start_row: int) -> Iterator[Chunk]:
        groups = [file.metadata.row_group(number) for number in range(self.first, self.stop)]
        total = sum(group.num_rows for group in groups)
        before = 0
        for number, group in enumerate(groups, self.first):
            end = before + group.num_rows
            if end > start_row:
                for chunk in _chunks_of_group(file, number, columns):
                    position = self.size * (before + chunk.position) // total
                    yield chunk._replace(first=before + chunk.first, position=position)
            before = end


def _chunks_of_group(file: pq.ParquetFile, number: int, columns: Columns) -> Iterator[Chunk]:
    """Yield a row group in pieces, whose `position` is in rows of the group."""
    group = file.metadata.row_group(number)
    mean_bytes = _text_bytes(group, columns) // max(1, group.num_rows)
    length = max(1, min(_MAX_ROWS, documents.BATCH_BYTES // max(1, mean_bytes)))
    done = 0
    try:
        for rows in _read(file, number, columns, length):
            yield Chunk(done, done + rows.num_rows, rows)
            done += rows.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        if not is_damage(error):
            raise
        for rows in _salvaged(file, number, columns, done):
            yield Chunk(done, done + 1, rows)
            done += 1
    lost = group.num_rows - done
    if lost > 0:
        size = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        yield Chunk(
            done, group.num_rows, None, problem=DAMAGED, lost_rows=lost, lost_bytes=size * lost // group.num_rows
        )


def _read(file: pq.ParquetFile, number: int, columns: Columns, length: int) -> Iterator[pa.RecordBatch]:
    names = [".".join(path) for path in columns.paths]
    rows: Iterator[pa.RecordBatch] = file.iter_batches(length, row_groups=[number], columns=names, use_threads=False)
    return rows


def _salvaged(file: pq.ParquetFile, number: int, columns: Columns, done: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a damaged row group one by one, from row `done` to the damage."""
    try:
        for row, rows in enumerate(_read(file, number, columns, 1)):
            if row >= done:
                yield rows
    except (pa.ArrowInvalid, OSError) as error:
        if not is_damage(error):
            raise


def _text_bytes(group: pq.RowGroupMetaData, columns: Columns) -> int:
    """Return the bytes of the columns of a row group, uncompressed."""
    found = [group.column(number) for number in range(group.num_columns)]
    prefixes = tuple(".".join(path) + "." for path in columns.paths)
    return sum(column.total_uncompressed_size for column in found if f"{column.path_in_schema}.".startswith(prefixes))


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file that is only read where necessary. Raises DataError if it is not Parquet."""
    checked_head(path, PARQUET)
    with pa.OSFile(str(path)) as source:
        # with pre_buffer, its default, whole column chunks are read first
        yield pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
