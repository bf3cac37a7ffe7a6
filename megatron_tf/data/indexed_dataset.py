"""Megatron-LM's indexed dataset: PREFIX.bin holds token ids, PREFIX.idx where each sequence and document begins."""

import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_INDEX_BLOCK = 1 << 20  # documents written at a time
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class DataError(ValueError):
    """Data that is missing, damaged or of something else: the message names the file and the fact."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron gives to ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDataset:
    """A memory-mapped PREFIX.bin/.idx. Raises DataError where either is not what it should be.

    `lengths` int32 [S] are tokens of each sequence; document d is sequences [documents[d], documents[d + 1]).
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index_path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index_path, data_path):
            if not path.is_file():
                raise DataError(f"{path} is missing: give the prefix that tools/preprocess_data.py wrote")
        self.dtype, self.lengths, self.offsets, self.documents = _read_index(index_path)
        self._check_offsets(index_path, data_path)
        size = data_path.stat().st_size
        self.tokens = np.memmap(data_path, dtype=self.dtype, mode="r") if size else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.documents) - 1

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [documents]."""
        ends = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        return np.diff(ends[self.documents])

    def document(self, index: int, start: int = 0, stop: int | None = None) -> NDArray[np.generic]:
        """Tokens [start, stop) of a document; sequences of one document lie end to end."""
        first, last = int(self.documents[index]), int(self.documents[index + 1])
        if first == last:
            return self.tokens[:0]
        begin = int(self.offsets[first]) // self.dtype.itemsize
        end = int(self.offsets[last - 1]) // self.dtype.itemsize + int(self.lengths[last - 1])
        return self.tokens[begin + start : end if stop is None else min(end, begin + stop)]

    def _check_offsets(self, index_path: Path, data_path: Path) -> None:
        if (self.lengths < 0).any():
            raise DataError(f"{index_path}: sequence {int((self.lengths < 0).argmax())} has a negative length")
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        if not np.array_equal(self.offsets, np.concatenate(([0], ends[:-1])) if len(ends) else ends):
            raise DataError(f"{index_path}: sequence offsets are not the running sum of lengths")
        total, size = int(ends[-1]) if len(ends) else 0, data_path.stat().st_size
        if size != total:
            raise DataError(f"{data_path} has {size:,} bytes, its index says {total:,}: it is truncated or of another")
        documents = self.documents
        if documents[0] != 0 or documents[-1] != len(self.lengths) or (np.diff(documents) < 0).any():
            raise DataError(f"{index_path}: the document index does not climb from 0 to {len(self.lengths)}")


def _read_index(path: Path) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path} is not an index of an indexed dataset: its first bytes are {header[:9]!r}")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{path} has version {version} and type code {code}; known are version 1 and codes 1 to 8")
    body = size - _HEADER.size
    needed = 12 * sequences + 8 * documents
    if documents < 1 or body not in (needed, needed + sequences):
        raise DataError(f"{path} is truncated or damaged: {sequences:,} sequences and {documents:,} document bounds "
                        f"need {needed:,} bytes after the header, there are {body:,}")  # fmt: skip
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    start = _HEADER.size
    lengths = mapped[start : start + 4 * sequences].view("<i4")
    offsets = mapped[start + 4 * sequences : start + 12 * sequences].view("<i8")
    bounds = mapped[start + 12 * sequences : start + needed].view("<i8")
    return np.dtype(_DTYPES[code]), lengths, offsets, bounds


def write_index(path: Path, dtype: np.dtype, document_lengths: NDArray[np.int32]) -> None:
    """Write an .idx whose documents are one sequence each, or none where the length is 0; in bounded memory."""
    blocks = [document_lengths[i : i + _INDEX_BLOCK] for i in range(0, len(document_lengths), _INDEX_BLOCK)]
    sequences = int(np.count_nonzero(document_lengths))
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, 1, _CODES[np.dtype(dtype)], sequences, len(document_lengths) + 1))
        for block in blocks:
            file.write(block[block > 0].astype("<i4").tobytes())
        offset = 0
        for block in blocks:
            sizes = block[block > 0].astype("<i8") * dtype.itemsize
            ends = np.cumsum(sizes) + offset
            file.write((ends - sizes).tobytes())
            offset = int(ends[-1]) if len(ends) else offset
        file.write(bytes(8))
        count = 0
        for block in blocks:
            bounds = np.cumsum(block > 0, dtype="<i8") + count
            file.write(bounds.tobytes())
            count = int(bounds[-1])
        file.flush()
        os.fsync(file.fileno())
