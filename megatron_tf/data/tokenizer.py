"""Tokenizers behind one interface: Hugging Face tokenizer.json, SentencePiece, and bytes."""

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_tf.data.indexed_dataset import DataError


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int
    eod: int
    """The id that ends a document."""
    identity: dict[str, Any]
    """What tells this tokenizer from another: type, size, hash of the file."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without the end of document."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


class HFTokenizer:
    """A Hugging Face tokenizer.json."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        candidates = [self._tokenizer.token_to_id(token) for token in ("<|endoftext|>", "</s>")]
        known = [token for token in candidates if token is not None]
        if not known:
            raise DataError(f"{path} has no end-of-document token: neither <|endoftext|> nor </s>")
        self.eod = known[0]
        self.identity = _identity("HFTokenizer", self.vocab_size, path)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


class SentencePieceTokenizer:
    """A SentencePiece .model."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._processor.get_piece_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise DataError(f"{path} has no end-of-sentence piece to end documents with")
        self.identity = _identity("SentencePieceTokenizer", self.vocab_size, path)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._processor.decode(list(ids))
        return text


class NullTokenizer:
    """Bytes as ids, 256 as the end of a document."""

    vocab_size = 257
    eod = 256

    def __init__(self, path: Path | None) -> None:
        self.identity = {"type": "NullTokenizer", "vocab_size": self.vocab_size, "sha256": None}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


TYPES = ("HFTokenizer", "SentencePieceTokenizer", "NullTokenizer")


def build_tokenizer(tokenizer_type: str, path: Path | None) -> Tokenizer:
    """The tokenizer of a type in TYPES. Raises DataError for another, and for a file that is missing or not one."""
    if tokenizer_type not in TYPES:
        near = difflib.get_close_matches(tokenizer_type, TYPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(TYPES)}"
        raise DataError(f"unknown tokenizer type {tokenizer_type!r}: {hint}")
    if tokenizer_type == "NullTokenizer":
        return NullTokenizer(path)
    if path is None or not path.is_file():
        raise DataError(f"{tokenizer_type} needs its file: {path or 'no tokenizer model'} is not one")
    try:
        return HFTokenizer(path) if tokenizer_type == "HFTokenizer" else SentencePieceTokenizer(path)
    except DataError:
        raise
    except Exception as error:  # both libraries raise bare Exception or RuntimeError for a file they can't parse
        raise DataError(f"{path} is not a {tokenizer_type} file: {error}") from error


def _identity(kind: str, vocab_size: int, path: Path) -> dict[str, Any]:
    return {"type": kind, "vocab_size": vocab_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
