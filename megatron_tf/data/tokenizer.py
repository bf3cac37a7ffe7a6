"""Tokenizers behind one interface: Hugging Face tokenizer.json, SentencePiece, tiktoken ranks, and bytes."""

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.bpe_engine import encode_flat, fast_engine, is_settled
from megatron_tf.data.indexed_dataset import DataError

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Encoded(NamedTuple):
    """Ids of several texts, end to end."""

    ids: NDArray[np.integer]
    lengths: NDArray[np.int64]
    """Ids of each text."""

    def rows(self) -> list[NDArray[np.integer]]:
        """The ids of each text."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])

    def chosen(self, which: Sequence[int]) -> "Encoded":
        """Only the texts `which`."""
        rows = self.rows()
        return Encoded(np.concatenate([rows[i] for i in which]), self.lengths[list(which)])

    def replaced(self, which: Sequence[int], others: "Encoded") -> "Encoded":
        """With the texts `which` encoded as in `others`."""
        rows, lengths = self.rows(), self.lengths.copy()
        for i, row in zip(which, others.rows(), strict=True):
            rows[i], lengths[i] = row, len(row)
        return Encoded(np.concatenate(rows), lengths)


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int
    eod: int
    """The id that ends a document."""
    identity: dict[str, Any]
    """What tells this tokenizer from another: type, size, hash of the file."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, without the end of document."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


class HFTokenizer:
    """A Hugging Face tokenizer.json: byte-level BPE by a fast engine where that gives the same ids."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._engine = fast_engine(path, self._tokenizer)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        candidates = [self._tokenizer.token_to_id(token) for token in END_OF_DOCUMENT]
        known = [token for token in candidates if token is not None]
        if not known:
            raise DataError(f"{path} has no end-of-document token: none of {', '.join(END_OF_DOCUMENT)}")
        self.eod = known[0]
        self.identity = _identity("HFTokenizer", self.vocab_size, path)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See Tokenizer."""
        texts = list(texts)
        if self._engine is None:
            return self._encode_slowly(texts)
        unsettled = [i for i, text in enumerate(texts) if not is_settled(text)]
        encoded = Encoded(*self._engine(texts))
        return encoded.replaced(unsettled, self._encode_slowly([texts[i] for i in unsettled])) if unsettled else encoded

    def _encode_slowly(self, texts: list[str]) -> Encoded:
        return _end_to_end([e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)])

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


class SentencePieceTokenizer:
    """A SentencePiece .model."""

    def __init__(self, path: Path, threads: int) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self._threads = threads
        self.vocab_size = self._processor.get_piece_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise DataError(f"{path} has no end-of-sentence piece to end documents with")
        self.identity = _identity("SentencePieceTokenizer", self.vocab_size, path)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See Tokenizer."""
        return _end_to_end(self._processor.encode(list(texts), num_threads=self._threads))

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._processor.decode(list(ids))
        return text


class TikTokenizer:
    """A file of tiktoken ranks, under the name of its encoding (r50k_base.tiktoken), which decides how text is cut."""

    def __init__(self, path: Path) -> None:
        import gigatoken

        self._tokenizer = gigatoken.Tokenizer.from_tiktoken(path)
        self._encode = encode_flat(self._tokenizer)
        self.vocab_size = self._tokenizer.vocab_size
        self.eod = self._tokenizer.as_tiktoken().eot_token
        self.identity = _identity("TikTokenizer", self.vocab_size, path)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See Tokenizer. Special tokens' names inside a text are encoded as these tokens."""
        return Encoded(*self._encode(list(texts)))

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._tokenizer.decode(np.asarray(ids, dtype=np.uint32)).decode(errors="replace")


class NullTokenizer:
    """Bytes as ids, 256 as the end of a document."""

    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        self.identity = {"type": "NullTokenizer", "vocab_size": self.vocab_size, "sha256": None}

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """See Tokenizer."""
        encoded = [text.encode() for text in texts]
        return Encoded(np.frombuffer(b"".join(encoded), np.uint8), np.array([len(e) for e in encoded], np.int64))

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


TYPES = ("HFTokenizer", "SentencePieceTokenizer", "TikTokenizer", "NullTokenizer")


def build_tokenizer(tokenizer_type: str, path: Path | None, threads: int = 1) -> Tokenizer:
    """The tokenizer of a type in TYPES. Raises DataError for another, and for a file that is missing or not one.

    `threads` encode a batch; those of byte-level BPE are counted by RAYON_NUM_THREADS instead.
    """
    if tokenizer_type not in TYPES:
        near = difflib.get_close_matches(tokenizer_type, TYPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(TYPES)}"
        raise DataError(f"unknown tokenizer type {tokenizer_type!r}: {hint}")
    if tokenizer_type == "NullTokenizer":
        return NullTokenizer()
    if path is None or not path.is_file():
        raise DataError(f"{tokenizer_type} needs its file: {path or 'no tokenizer model'} is not one")
    try:
        if tokenizer_type == "SentencePieceTokenizer":
            return SentencePieceTokenizer(path, threads)
        return HFTokenizer(path) if tokenizer_type == "HFTokenizer" else TikTokenizer(path)
    except DataError:
        raise
    except Exception as error:  # these libraries raise bare Exception or RuntimeError for a file they can't parse
        raise DataError(f"{path} is not a {tokenizer_type} file: {error}") from error


def _end_to_end(rows: list[list[int]]) -> Encoded:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = (i for row in rows for i in row)
    return Encoded(np.fromiter(flat, dtype=np.int32, count=int(lengths.sum())), lengths)


def _identity(kind: str, vocab_size: int, path: Path) -> dict[str, Any]:
    return {"type": kind, "vocab_size": vocab_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
