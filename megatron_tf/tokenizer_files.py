"""The files of a tokenizer: one, or a pair that belongs together by name."""

import hashlib
from pathlib import Path

PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""Suffixes of the vocabulary and merges files of GPT-2's byte-level BPE."""
NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files next to the tokenizer that name the end of a document."""


def merges_file(path: Path) -> Path | None:
    """Return the path of a vocabulary's merges, next to it; None for other files."""
    for vocabulary, merges in PAIRS.items():
        if path.name.endswith(vocabulary):
            return path.with_name(path.name.removesuffix(vocabulary) + merges)
    return None


def description_file(path: Path) -> Path:
    """Return the path of the optional description of a file of tiktoken ranks: NAME.tiktoken.json next to it."""
    return path.with_name(f"{path.name.removesuffix('.tiktoken')}.tiktoken.json")


def parts_of(path: Path) -> list[Path]:
    """Return the file, and those next to it that also determine the ids."""
    others = (merges_file(path), description_file(path))
    return [path, *(other for other in others if other is not None and other.is_file())]


def digest_of(path: Path) -> str:
    """Return the SHA-256 of the file, or of the hashes of its parts. Raises OSError if one can't be read."""
    digests = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts_of(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
