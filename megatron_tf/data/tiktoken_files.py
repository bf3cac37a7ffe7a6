"""Rank files for tiktoken: Mistral's tekken.json, and files of any name with a description next to them.

NAME.tiktoken.json next to NAME.tiktoken, or to another NAME, is {"encoding": PUBLISHED} or
{"pattern": REGEX, "special_tokens": {TOKEN: ID}}.
"""

import base64
import binascii
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_tf.data.encoded import Encoded, end_to_end
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.tiktoken_reference import PATTERNS, SPECIAL_TOKENS
from megatron_tf.tokenizer_files import description_file, digest_of

if TYPE_CHECKING:
    import tiktoken

log = logging.getLogger(__name__)

_PUBLISHED = {  # SHA-256 of the files published by OpenAI
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": "r50k_base",
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": "p50k_base",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
}
_ENCODINGS = {name: (PATTERNS[name], SPECIAL_TOKENS[name]) for name in PATTERNS} | {
    "p50k_base": (PATTERNS["r50k_base"], SPECIAL_TOKENS["r50k_base"])
}
_TEKKEN_SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]
"""Special tokens of versions up to 7, whose files do not list them."""


class Description(NamedTuple):
    """Everything that defines an encoding."""

    pattern: str
    ranks: dict[bytes, int]
    special_tokens: dict[str, int]
    are_read: bool
    """Whether the names of special tokens within a text are encoded as these tokens."""
    end: str


def read_description(path: Path) -> Description | None:
    """Read the definition of a rank file; None if only its name could tell. Raises DataError for malformed files."""
    if path.suffix == ".json":
        return _tekken(path)
    description = description_file(path)
    if description.is_file():
        pattern, special = _described(description)
    else:
        name = _PUBLISHED.get(hashlib.sha256(path.read_bytes()).hexdigest(), path.name.removesuffix(".tiktoken"))
        if name not in _ENCODINGS:
            return None
        pattern, special = _ENCODINGS[name]
    return Description(pattern, _ranks(path), special, are_read=True, end="<|endoftext|>")


class RanksTokenizer:
    """Encodes with tiktoken. Raises DataError if it is not installed, or if the files are not a valid encoding."""

    def __init__(self, path: Path, description: Description, eod_token: str | None = None) -> None:
        _check(path, description)
        try:
            self._encoding = _encoding(path, description)
        except ImportError:
            raise DataError(f"{path} is read by tiktoken, which is not installed: pip install tiktoken") from None
        self._path = path
        self._description = description
        self._eod_token = eod_token
        self.vocab_size = max((*description.ranks.values(), *description.special_tokens.values())) + 1
        self.identity = {"type": "TikTokenizer", "vocab_size": self.vocab_size, "sha256": digest_of(path)}

    @cached_property
    def eod(self) -> int:
        """The id of --eod-token, or of the encoding's own end-of-text token. Raises DataError if it has none."""
        special = self._description.special_tokens
        token = self._eod_token or self._description.end
        if token not in special:
            names = ", ".join(list(special)[:20]) or "none"
            raise DataError(f"{self._path} has no special token {token!r}: choose --eod-token from {names}")
        return special[token]

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        if self._description.are_read:
            return end_to_end([self._encoding.encode(text, allowed_special="all") for text in texts])
        return end_to_end([self._encoding.encode_ordinary(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(np.asarray(ids).tolist())


def tiktoken_encoder(path: Path, special_tokens: dict[str, int]) -> Callable[[Sequence[str]], Encoded] | None:
    """Make tiktoken's encoder for a file named after its encoding; warn and return None if tiktoken is missing."""
    pattern = PATTERNS[path.name.removesuffix(".tiktoken")]
    try:
        encoding = _encoding(path, Description(pattern, _ranks(path), special_tokens, are_read=True, end=""))
    except ImportError:
        _warn(path)
        return None
    return lambda texts: end_to_end([encoding.encode(text, allowed_special="all") for text in texts])


@cache
def _warn(path: Path) -> None:
    log.warning(
        "%s: tiktoken is not installed; it may cut texts differently that have letters, marks or numbers which came "
        "after Unicode 3.2: pip install tiktoken",
        path,
    )


def _encoding(path: Path, description: Description) -> "tiktoken.Encoding":
    import tiktoken

    return tiktoken.Encoding(
        path.name,
        pat_str=description.pattern,
        mergeable_ranks=description.ranks,
        special_tokens=description.special_tokens,
    )


def _check(path: Path, description: Description) -> None:
    """Raise DataError for input that makes tiktoken panic, or that it accepts silently."""
    missing = next((i for i in range(256) if bytes([i]) not in description.ranks), None)
    if missing is not None:
        raise DataError(f"{path} has no token for byte {missing}: it is incomplete")
    ids = [*description.ranks.values(), *description.special_tokens.values()]
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: two tokens have the same id; do the special tokens belong to another file?")


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number} is not a line of ranks, a token in base64 and its number") from None
    return ranks


def _described(path: Path) -> tuple[str, dict[str, int]]:
    """Return (pattern, special tokens) of a description."""
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    expected = 'expected {"encoding": NAME} or {"pattern": REGEX, "special_tokens": {TOKEN: ID}}'
    if not isinstance(content, dict) or not content.keys() <= {"encoding", "pattern", "special_tokens"}:
        raise DataError(f"{path} does not describe ranks: {expected}")
    pattern, special = _ENCODINGS.get(str(content.get("encoding")), (None, {}))
    if "encoding" in content and pattern is None:
        raise DataError(f"{path}: encoding {content['encoding']!r} is not one of {', '.join(_ENCODINGS)}")
    pattern = content.get("pattern", pattern)
    special = content.get("special_tokens", special)
    is_right = isinstance(special, dict) and all(type(i) is int and i >= 0 for i in special.values())
    if not isinstance(pattern, str) or not is_right:
        raise DataError(f"{path} does not describe ranks: {expected}")
    return pattern, special


def _tekken(path: Path) -> Description:
    """Read Mistral's file: special tokens come first, and the vocabulary is truncated to the size it declares."""
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    try:
        config = content["config"]
        entries = content["vocab"]
        count = int(config["default_num_special_tokens"])
        kept = entries[: int(config["default_vocab_size"]) - count]
        named = content.get("special_tokens")
        special = {str(t["token_str"]): int(t["rank"]) for t in named} if named else _old_special(path, config)
        ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) + count for entry in kept}
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a tekken.json: {error!r}") from error
    if sorted(ranks.values()) != list(range(count, count + len(kept))) or max(special.values(), default=-1) >= count:
        raise DataError(f"{path} is not a tekken.json: the ranks of its vocabulary or of its special tokens have gaps")
    taken = set(special.values())
    special |= {f"<SPECIAL_{i}>": i for i in range(count) if i not in taken}
    return Description(pattern, ranks, special, are_read=False, end="</s>")


def _old_special(path: Path, config: Any) -> dict[str, int]:
    version = str(config.get("version", ""))
    if not version.removeprefix("v").isdigit() or int(version.removeprefix("v")) > 7:
        raise DataError(f"{path} has version {version!r} but lists no special tokens: update the file")
    return {token: i for i, token in enumerate(_TEKKEN_SPECIAL)}
