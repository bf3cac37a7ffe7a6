"""Inputs by their names: files of lines, Parquet and Arrow files, and standard input."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tf.data.documents import BEGINNING, DocumentBatch, Fields, Input, Position, Source, read_batches
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.inputs import FileInput, find_inputs
from megatron_tf.data.standard_input import STANDARD_INPUT, StandardInput
from megatron_tf.extras import needed_by


def inputs_of(patterns: Sequence[str]) -> list[Input]:
    """Expand patterns and `-`, which is standard input, into inputs. Raises as `find_inputs` does."""
    files = [pattern for pattern in patterns if pattern != STANDARD_INPUT]
    inputs = [_input_of(path) for path in find_inputs(files)]
    streams = len(patterns) - len(files)
    if streams > 1:
        raise DataError(f"--input names {STANDARD_INPUT}, which is standard input, twice")
    if streams:
        place = len(find_inputs(patterns[: patterns.index(STANDARD_INPUT)]))
        inputs.insert(place, StandardInput())
    return inputs


def _input_of(path: Path) -> Input:
    with needed_by(str(path)):
        if path.suffix == ".parquet":
            from megatron_tf.data.parquet_files import ParquetInput

            return ParquetInput(path)
        if path.suffix == ".arrow":
            from megatron_tf.data.arrow_files import ArrowInput

            return ArrowInput(path)
    return LinesInput(path)


def sources_of(inputs: Sequence[Input], fields: Fields) -> list[list[Source]]:
    """Return the sources of each input. Raises DataError that names all inputs that can't be read."""
    sources = []
    failures = []
    for each in inputs:
        try:
            sources.append(list(each.sources(fields)))
        except DataError as error:
            failures.append(str(error))
    if len(failures) > 1:
        raise DataError("\n".join([f"{len(failures)} of {len(inputs)} inputs can't be used:", *failures]))
    if failures:
        raise DataError(failures[0])
    return sources


@dataclass(frozen=True)
class LinesInput(FileInput):
    """A file of JSON lines, compressed or not; it is also its only source."""

    is_whole = True

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    def sources(self, fields: Fields) -> Sequence[Source]:
        """Return the file itself: it is opened when it is read."""
        return [self]

    def batches(self, fields: Fields, start: Position = BEGINNING) -> Iterator[DocumentBatch]:
        """Yield the documents of the lines after a position, as `read_batches` does."""
        return read_batches(self.path, fields.keys, first_line=start.rows, chat=fields.chat)
