"""Tokenizers behind one interface: Hugging Face tokenizer.json, SentencePiece, tiktoken ranks, and bytes."""

import difflib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.bpe_engine import Engine, fast_engine, is_settled, vocab_size_of
from megatron_tf.data.encoded import Encoded, end_to_end
from megatron_tf.data.hf_files import end_of_document, special_tokens_of, text_to_ids_only
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.tiktoken_files import RanksTokenizer, read_description, tiktoken_encoder
from megatron_tf.data.tiktoken_reference import PATTERNS, SPECIAL_TOKENS
from megatron_tf.tokenizer_files import description_file, digest_of

if TYPE_CHECKING:
    import tokenizers


class Tokenizer(Protocol):
    """Interface of a tokenizer: encodes text to ids and decodes ids to text."""

    vocab_size: int
    """Highest id + 1, the number of embedding rows it needs. Some vocabularies have fewer tokens."""
    identity: dict[str, Any]
    """Identifies the tokenizer: its type, size and hash of the file."""

    @property
    def eod(self) -> int:
        """The end-of-document id. Raises DataError if it is unknown."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode each text, without an end of document."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""


class HFTokenizer:
    """A Hugging Face tokenizer.json, or GPT-2's vocab.json with merges.txt. Byte-level BPE uses a faster engine if it
    gives the same ids."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        self._path = path
        self._eod_token = eod_token
        self._content = text_to_ids_only(path)
        self._engine = fast_engine(path, self._content, lambda: self._reference)
        self._library = Lock()
        self.vocab_size = self._engine.vocab_size if self._engine else vocab_size_of(self._reference)
        self.identity = _identity("HFTokenizer", self.vocab_size, path)

    @cached_property
    def _reference(self) -> "tokenizers.Tokenizer":
        """The library's tokenizer. It takes a tenth of a second to load, and few texts need it."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._content.json.decode())

    @cached_property
    def eod(self) -> int:
        return end_of_document(self._path, self._special_tokens, id_of=self._id_of, eod_token=self._eod_token)

    @cached_property
    def _special_tokens(self) -> dict[str, int]:
        # the engine's check compared them with those of the library
        return self._content.special_tokens if self._engine else special_tokens_of(self._reference)

    def _id_of(self, token: str) -> int | None:
        if token in self._special_tokens:
            return self._special_tokens[token]
        found: int | None = self._reference.token_to_id(token)
        return found

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        texts = list(texts)
        if self._engine is None:
            return self._encode_slowly(texts)
        return _settled(texts, self._engine.encode(texts), self._encode_slowly)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Encode each text into its ids [n] and the (start, stop) characters of each of them [n, 2]."""
        with self._library:
            encoded = self._reference.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int64), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in encoded]

    def _encode_slowly(self, texts: Sequence[str]) -> Encoded:
        with self._library:  # it takes much memory, and all threads, for one batch
            return end_to_end([e.ids for e in self._reference.encode_batch_fast(texts, add_special_tokens=False)])

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._reference.decode(list(ids), skip_special_tokens=False)
        return text


class SentencePieceTokenizer:
    """A SentencePiece .model file."""

    def __init__(self, path: Path, threads: int, eod_token: str | None = None) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self._threads = threads
        self._library = Lock()
        self._path = path
        self._eod_token = eod_token
        self.vocab_size = self._processor.get_piece_size()
        self.identity = _identity("SentencePieceTokenizer", self.vocab_size, path)

    @cached_property
    def eod(self) -> int:
        if self._eod_token is not None:
            found: int = self._processor.piece_to_id(self._eod_token)
            if self._processor.id_to_piece(found) != self._eod_token:  # it returns <unk> for unknown pieces
                raise DataError(f"{self._path} has no piece {self._eod_token!r}: give another as --eod-token")
            return found
        end: int = self._processor.eos_id()
        if end < 0:
            raise DataError(f"{self._path} has no end-of-sentence piece to end documents with: give --eod-token")
        return end

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        with self._library:  # it takes much memory, and all threads, for one batch
            return end_to_end(self._processor.encode(list(texts), num_threads=self._threads))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text


class TikTokenizer:
    """A file of tiktoken ranks, named after its encoding (r50k_base.tiktoken), which determines how text is split."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        import gigatoken

        self._path = path
        self._engine = Engine(gigatoken.Tokenizer.from_tiktoken(path))
        self._special_tokens: dict[str, int] = SPECIAL_TOKENS[path.name.removesuffix(".tiktoken")]
        token = "<|endoftext|>" if eod_token is None else eod_token
        if token not in self._special_tokens:
            raise DataError(f"{path} has no special token {token!r}: --eod-token is {', '.join(self._special_tokens)}")
        self.eod = self._special_tokens[token]
        self.vocab_size = self._engine.vocab_size
        self.identity = _identity("TikTokenizer", self.vocab_size, path)

    @cached_property
    def _reference(self) -> Callable[[Sequence[str]], Encoded]:
        return tiktoken_encoder(self._path, self._special_tokens) or self._engine.encode

    def _encode_slowly(self, texts: Sequence[str]) -> Encoded:
        return self._reference(texts)  # built when the first text needs it

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode each text; names of special tokens within a text are encoded as these tokens."""
        texts = list(texts)
        return _settled(texts, self._engine.encode(texts), self._encode_slowly)

    def decode(self, ids: Sequence[int]) -> str:
        return self._engine.decode(ids)


def _settled(texts: list[str], encoded: Encoded, encode: Callable[[Sequence[str]], Encoded]) -> Encoded:
    """Encode the texts that engines may split differently again with `encode`."""
    unsettled = [i for i, text in enumerate(texts) if not is_settled(text)]
    return encoded.replaced(unsettled, encode([texts[i] for i in unsettled])) if unsettled else encoded


class NullTokenizer:
    """Encodes text as its UTF-8 bytes; id 256 is the end of a document."""

    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        self.identity = {"type": "NullTokenizer", "vocab_size": self.vocab_size, "sha256": None}

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        encoded = [text.encode() for text in texts]
        return Encoded(np.frombuffer(b"".join(encoded), np.uint8), np.array([len(e) for e in encoded], np.int64))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


TYPES = ("HFTokenizer", "SentencePieceTokenizer", "TikTokenizer", "NullTokenizer")
_ELSEWHERE = {  # names of Megatron-LM and gpt-neox
    "GPT2BPETokenizer": "HFTokenizer, with its vocab.json, merges.txt next to it, or a tokenizer.json",
    "GPT2BPETokenizerFast": "HFTokenizer, with its vocab.json, merges.txt next to it, or a tokenizer.json",
    "HFGPT2Tokenizer": "HFTokenizer, with its tokenizer.json",
    "HuggingFaceTokenizer": "HFTokenizer, with a tokenizer.json",
    "Llama3Tokenizer": "HFTokenizer, with its tokenizer.json",
    "Llama2Tokenizer": "SentencePieceTokenizer, with its tokenizer.model",
    "GPTSentencePieceTokenizer": "SentencePieceTokenizer, with a .model",
    "SPMTokenizer": "SentencePieceTokenizer, with a .model",
    "TiktokenTokenizer": "TikTokenizer, with a file of ranks",
    "MistralTokenizer": "TikTokenizer, with its tekken.json",
}


def build_tokenizer(
    tokenizer_type: str, path: Path | None, *, threads: int = 1, eod_token: str | None = None
) -> Tokenizer:
    """Build a tokenizer of a type in TYPES. Raises DataError for other types, and for a missing or malformed file.

    `threads` is the number of threads that encode a batch; byte-level BPE uses RAYON_NUM_THREADS instead. `eod_token`
    replaces the end-of-document token named in the tokenizer's files.
    """
    if tokenizer_type not in TYPES:
        near = difflib.get_close_matches(tokenizer_type, TYPES, n=1, cutoff=0.85)
        names = [_ELSEWHERE[tokenizer_type]] if tokenizer_type in _ELSEWHERE else near
        hint = f"did you mean {names[0]}?" if names else f"known are {', '.join(TYPES)}"
        raise DataError(f"unknown tokenizer type {tokenizer_type!r}: {hint}")
    if tokenizer_type == "NullTokenizer":
        if eod_token is not None:
            raise DataError("NullTokenizer ends documents with id 256: leave the end-of-document token out")
        if path is not None:
            raise DataError(f"NullTokenizer reads no file: leave {path} out, or choose another type")
        return NullTokenizer()
    if path is None or not path.is_file():
        found = f"there is no file at {path}" if path else "none is given"
        raise DataError(f"{tokenizer_type} needs a tokenizer file, but {found}")
    try:
        if tokenizer_type == "SentencePieceTokenizer":
            return SentencePieceTokenizer(path, threads, eod_token)
        if tokenizer_type == "HFTokenizer":
            return HFTokenizer(path, eod_token)
        return _of_ranks(path, eod_token)
    except (DataError, OSError):
        raise
    except Exception as error:  # these libraries raise Exception or RuntimeError for a file that they can't parse
        raise DataError(f"{path} is not a {tokenizer_type} file: {error}") from error


def _of_ranks(path: Path, eod_token: str | None) -> Tokenizer:
    """Build a tokenizer with the fast engine if it knows the encoding by the file's name, else with tiktoken."""
    if path.name.removesuffix(".tiktoken") in PATTERNS and not description_file(path).is_file():
        return TikTokenizer(path, eod_token)
    description = read_description(path)
    if description is None:
        raise DataError(
            f"{path}: a file of ranks does not say how text is split: give it the name of its encoding "
            f"({', '.join(f'{name}.tiktoken' for name in PATTERNS)}), or describe it in "
            f"{description_file(path).name} next to it; or use the tokenizer.json of the same model and HFTokenizer"
        )
    return RanksTokenizer(path, description, eod_token)


def _identity(kind: str, vocab_size: int, path: Path) -> dict[str, Any]:
    return {"type": kind, "vocab_size": vocab_size, "sha256": digest_of(path)}
