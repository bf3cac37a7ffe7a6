"""gigatoken, a fast engine for byte-level BPE, used only after it has reproduced Hugging Face's tokenizers."""

import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_tf.data.encoded import Encoded, joined
from megatron_tf.data.engine_verdicts import is_known_good, remember_good
from megatron_tf.data.hf_files import TextToIds, special_tokens_of

if TYPE_CHECKING:
    import gigatoken
    import tokenizers

log = logging.getLogger(__name__)

# Characters outside ranges on which all engines agree: a text without any needs no closer look.
_UNSETTLED = re.compile(
    "[^\x00-\u0220\u0250-\u02ad\u02b0-\u034f\u0400-\u0486\u05d0-\u05ea"
    "\u038e-\u03a1\u03a3-\u03ce\u0621-\u063a\u0640-\u0655\u093c-\u094d\ufe00-\ufe0f"
    "\u0660-\u06ed\u0901-\u0903\u0905-\u0939\u0e01-\u0e3a"
    "\u1e00-\u1e9b\u1ea0-\u1ef9\u2000-\u2063\u20a0-\u20b1\u2100-\u213a\u2190-\u2426\u2460-\u24fe\u2500-\u2b73\u3000-\u303f"
    "\u3041-\u3096\u3099-\u30ff\u3250-\u4db5\u4dc0-\u9fa5\uac00-\ud7a3\ufe0f\uff01-\uffbe\ufffd\U0001f300-\U0001f6d7]"
)
_ASCII = bytes(range(128))
_PIECE = 1 << 16  # characters
FEW_CHARACTERS = 16 << 20  # about as many as are encoded in the time that importing awkward takes
PROBES = [
    "",
    " ",
    "The quick brown fox's 12,345 dogs don't; they'll've WE'RE I'M naïve café déjà-vu\n\n\tx  \r\n   end ",
    "e\u0301 \u1e9b\u0323 \u212b \ufb01 \u1112\u1161\u11ab \u00a0\u2003\u3000\u200b\ufeff\u0085\u2028x",
    "日本語のテキスト、한국어 Русский עברית العربية हिन्दी ไทย \U0001d518\U0001d52b",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪 ½²③٣४ ±∑√ «»¿¡ §\u0000\u0001\u001f\u007f\u0080\ufffd\U0010ffff",
    " " * 100 + "x" + "\t" * 30 + "\n" * 50 + " y" + "\n \n  \n",
    "a" * 300 + "1" * 300 + "." * 300 + "\u0301" * 50 + "'s" * 50,
    "<|endoftext|>x<|endoftext|> <|padding|><|endoftext|",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # http://a.b/c?d=e&f=%20\n\tif __name__ == '__main__': pass",
]
"""Texts that tokenizers easily encode wrongly."""


def fast_engine(path: Path, content: TextToIds, reference: Callable[[], "tokenizers.Tokenizer"]) -> "Engine | None":
    """Return a gigatoken encoder for the contents of a tokenizer.json if it reproduces `reference` on PROBES.

    Otherwise log the reason and return None. `reference` loads Hugging Face's tokenizer; a check that passed before is
    remembered, and then it is not loaded.
    """
    try:
        import gigatoken

        engine = Engine(gigatoken.Tokenizer.from_json(content.json))
        if is_known_good(content.json, PROBES):
            return engine
        reason = _difference(engine, content, reference())
    except Exception as error:  # it may raise anything for a tokenizer that it does not support
        reason = f"it can't be used here ({error})"
    if reason is None:
        remember_good(content.json, PROBES)
        return engine
    log.warning("%s: encoding with the tokenizers library instead of the faster gigatoken: %s", path, reason)
    return None


def is_settled(text: str) -> bool:
    """Return whether every Unicode version since 3.2 normalizes and classifies the text in the same way.

    Engines ship tables of different Unicode versions. The category and normalization of an assigned character never
    change, so engines can only disagree about letters, marks, numbers and controls that were added later.
    """
    if text.isascii():
        return True
    # in pieces, so that little memory is used for a long text
    return all(_is_settled_piece(text[start : start + _PIECE]) for start in range(0, len(text), _PIECE))


def _is_settled_piece(text: str) -> bool:
    # deleting bytes is several times as fast as looking at all characters, most of which are ASCII
    rest = text.encode().translate(None, _ASCII).decode()
    if _UNSETTLED.search(rest) is None:
        return True
    return all(_is_settled_character(c) for c in set(rest))  # a set, since a list would take 60 bytes per character


@cache
def _is_settled_character(character: str) -> bool:
    was_unassigned = unicodedata.ucd_3_2_0.category(character) == "Cn"
    return not (was_unassigned and unicodedata.category(character)[0] in "LMNC")


class Engine:
    """A gigatoken tokenizer that encodes without a Python object per id.

    It uses all threads of the engine once it has to encode more than `few_characters`.
    """

    def __init__(self, tokenizer: "gigatoken.Tokenizer", few_characters: int = FEW_CHARACTERS) -> None:
        self._tokenizer = tokenizer
        self._few_characters = few_characters
        self._characters = 0
        self._lock = Lock()

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""
        return self._tokenizer.vocab_size

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode each text; several threads may call this at once."""
        # gigatoken refuses to encode a text while another thread encodes a batch, but batches may overlap
        with self._lock:
            self._characters += sum(map(len, texts))
            # encode_batch imports awkward, which takes longer than to encode a few texts one by one
            if self._characters <= self._few_characters:
                return joined([self._tokenizer.encode(text) for text in texts])
        layout: Any = self._tokenizer.encode_batch(list(texts)).layout
        return Encoded(layout.content.data, np.diff(layout.offsets.data))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""
        return self._tokenizer.decode(np.asarray(ids, dtype=np.uint32)).decode(errors="replace")


def vocab_size_of(tokenizer: "tokenizers.Tokenizer") -> int:
    """Return the highest id + 1 of a tokenizer of the tokenizers library."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _difference(engine: Engine, content: TextToIds, reference: "tokenizers.Tokenizer") -> str | None:
    size = vocab_size_of(reference)
    if engine.vocab_size != size:
        return f"its highest id is {engine.vocab_size - 1}, not {size - 1}"
    if content.special_tokens != special_tokens_of(reference):
        return "its special tokens have other ids"
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    probes = [*PROBES, *added, "a" + "b".join(added) + " c"]
    rows = engine.encode(probes).rows()
    expected_rows = reference.encode_batch_fast(probes, add_special_tokens=False)
    for text, row, expected in zip(probes, rows, expected_rows, strict=True):
        if row.tolist() != expected.ids:
            return f"it encodes {text[:40]!r} differently"
    return None
