"""Megatron-LM's indexed dataset: PREFIX.bin holds token ids, PREFIX.idx the sequence and document boundaries."""

import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data._index import check_index
from megatron_tf.data.open_files import DataError, OpenFile
from megatron_tf.files import sync_file

__all__ = ["DataError", "IndexedDataset"]

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_FAIRSEQ_HEADER = struct.Struct("<9sQBQ")
_TYPES_BY_CODE = {  # of elements; the codes are those of Megatron-LM
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_TYPE_SIZES = bytes([0, *(np.dtype(dtype).itemsize for dtype in _TYPES_BY_CODE.values())])
INDEX_BLOCK = 1 << 20  # documents written at a time
_CODES = {np.dtype(dtype): code for code, dtype in _TYPES_BY_CODE.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type Megatron-LM stores ids of a vocabulary of this size in."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDataset:
    """A PREFIX.bin/.idx pair. Raises DataError if either is invalid, if they don't match, and if they change later.

    `lengths`, int32 [S], holds the number of tokens of each sequence; document d consists of sequences [documents[d],
    documents[d + 1]). With `by_sequence` each sequence is a document, as in Megatron-LM's GPT datasets.
    """

    def __init__(self, prefix: str | Path, by_sequence: bool = False) -> None:
        self.prefix = Path(prefix)
        index_path = Path(f"{prefix}.idx")
        data_path = Path(f"{prefix}.bin")
        for path in (index_path, data_path):
            if not path.is_file():
                raise DataError(f"{path} is missing: give the prefix that megatron-tf preprocess-data wrote")
        self._index_file = OpenFile(index_path)
        index = _read_index(self._index_file)
        self.dtype = index.dtype
        self.lengths = index.lengths
        self.offsets = index.offsets
        self.documents = index.bounds
        self._one_sequence_each = index.one_sequence_each or by_sequence
        self._bounds = range(len(self.lengths) + 1) if by_sequence else self.documents
        self._data_file = OpenFile(data_path)
        found, size = self._data_file.size, index.data_bytes
        if found != size:
            raise DataError(f"{data_path} has {found:,} bytes, its index says {size:,}: it is truncated or of another")
        self.num_tokens = size // self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def document_lengths(self) -> NDArray[np.integer]:
        """Number of tokens of each document, [documents]; int32, or int64 if a document has several sequences."""
        if self._one_sequence_each:
            return self.lengths
        # differences of running sums: unlike reduceat, also correct for documents without a sequence
        ends = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        return np.diff(ends[self.documents])

    def document(self, index: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """Return tokens [start, stop) of a document, which can't be written to; its sequences are contiguous.

        Raises DataError naming the file if it was truncated meanwhile or can't be read.
        """
        return self.ids(*self._extent(index, start, stop))

    def ids(self, first: int, last: int) -> NDArray[np.integer]:
        """Return tokens [first, last) of the whole file, as `document` does."""
        size = self.dtype.itemsize
        return np.frombuffer(self._data_file.read(first * size, (last - first) * size), self.dtype)

    def place(self, index: int, offset: int) -> tuple[int, int]:
        """Return (document, offset in it) of a token, by the file's own documents even with `by_sequence`."""
        if self._bounds is self.documents:
            return index, offset
        document = int(np.searchsorted(self.documents, index, side="right")) - 1
        before = self.offsets[index] - self.offsets[self.documents[document]]
        return document, offset + int(before) // self.dtype.itemsize

    def prefetch(self, index: int, start: int, stop: int) -> None:
        """Ask the operating system to read ahead what `document` would return, without waiting for it."""
        first, last = self._extent(index, start, stop)
        size = self.dtype.itemsize
        self._data_file.prefetch(first * size, (last - first) * size)

    def _extent(self, index: int, start: int, stop: int | None) -> tuple[int, int]:
        self._index_file.check()  # it is mapped: reading a part that is gone would end the process with SIGBUS
        first, last = int(self._bounds[index]), int(self._bounds[index + 1])
        # a document without a sequence has no offset
        if first == last:
            return 0, 0
        size = self.dtype.itemsize
        begin = int(self.offsets[first]) // size
        end = int(self.offsets[last - 1]) // size + int(self.lengths[last - 1])
        return min(end, begin + start), end if stop is None else min(end, begin + stop)


class _Index(NamedTuple):
    dtype: np.dtype
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    bounds: NDArray[np.int64]
    data_bytes: int
    one_sequence_each: bool


def _read_index(file: OpenFile) -> _Index:
    """Validate an index file completely, and return views of it."""
    path, mapped = file.path, file.mapped()
    try:
        code, sequences, bounds, data_bytes, one_sequence_each = check_index(mapped, _TYPE_SIZES)
    except ValueError as error:
        raise DataError(f"{path}: {_is_of_fairseq(mapped) or error}") from None
    if np.issubdtype(_TYPES_BY_CODE[code], np.floating):
        raise DataError(
            f"{path}: it holds {np.dtype(_TYPES_BY_CODE[code])} values, not token ids: use a dataset of tokens"
        )
    # anything after the boundaries is one byte per sequence: its mode
    modes = mapped[_HEADER.size + 12 * sequences + 8 * bounds :]
    if modes.any():
        raise DataError(
            f"{path}: it is multimodal, sequence {int(modes.argmax())} has mode {int(modes.max())}: "
            f"only text datasets (mode 0) are supported"
        )
    starts = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * bounds])
    return _Index(
        dtype=np.dtype(_TYPES_BY_CODE[code]),
        lengths=mapped[starts[0] : starts[1]].view("<i4"),
        offsets=mapped[starts[1] : starts[2]].view("<i8"),
        bounds=mapped[starts[2] : starts[3]].view("<i8"),
        data_bytes=data_bytes,
        one_sequence_each=one_sequence_each,
    )


def _is_of_fairseq(index: NDArray[np.generic]) -> str | None:
    """Return the message for an index in one of fairseq's formats, which have no documents; None for others."""
    head = index[: _FAIRSEQ_HEADER.size].tobytes()
    if head.startswith(b"TNTIDX"):
        return "it is in fairseq's or Megatron-LM's old format without memory mapping: preprocess the text again"
    if len(head) < _FAIRSEQ_HEADER.size or not head.startswith(MAGIC):
        return None
    sequences = _FAIRSEQ_HEADER.unpack(head)[3]
    if len(index) != _FAIRSEQ_HEADER.size + 12 * sequences:
        return None
    return "it is in fairseq's format, which has no document index: preprocess the text again"


Blocks = Callable[[], Iterable[tuple[NDArray[np.int32], NDArray[np.integer]]]]
"""Returns, each time it is called, an iterator over blocks of (tokens per sequence, sequences per document)."""


def write_index(path: Path, dtype: np.dtype, blocks: Blocks) -> None:
    """Write an .idx file, with one block in memory at a time."""
    with path.open("wb") as file:
        file.write(bytes(_HEADER.size))  # placeholder until the counts are known
        # the file has all lengths, then all offsets, then all boundaries: three passes only hold one block in memory
        sequences = sum(file.write(lengths.astype("<i4").tobytes()) for lengths, _ in blocks()) // 4
        offset = 0
        for lengths, _ in blocks():
            sizes = lengths.astype("<i8") * dtype.itemsize
            ends = np.cumsum(sizes) + offset
            file.write((ends - sizes).tobytes())
            offset = int(ends[-1]) if len(ends) else offset
        bound = 0
        bounds = 1
        file.write(bytes(8))
        for _, counts in blocks():
            ends = np.cumsum(counts, dtype="<i8") + bound
            bounds += file.write(ends.tobytes()) // 8
            bound = int(ends[-1]) if len(ends) else bound
        # last, so that a file cut short by a crash does not look like an index
        file.seek(0)
        file.write(_HEADER.pack(MAGIC, 1, _CODES[np.dtype(dtype)], sequences, bounds))
        sync_file(file)


def blocks_of_documents(document_lengths: NDArray[np.int32]) -> Blocks:
    """Return the blocks for documents with one sequence each, or none if the length is 0."""

    def blocks() -> Iterator[tuple[NDArray[np.int32], NDArray[np.integer]]]:
        for start in range(0, len(document_lengths), INDEX_BLOCK):
            block = document_lengths[start : start + INDEX_BLOCK]
            # Megatron-LM writes no sequence for an empty document, only a boundary
            yield block[block > 0], (block > 0).astype(np.int8)

    return blocks
