"""The files that a tokenizer is made of: one, or two that belong together by their names."""

import hashlib
from pathlib import Path

PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""Ends of names of byte-level BPE's files, as GPT-2 has them: its vocabulary and its merges."""
NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Next to a tokenizer's file, they name the end of a document."""


def merges_file(path: Path) -> Path | None:
    """Where the merges of a vocabulary should be: next to it; None for another file."""
    for vocabulary, merges in PAIRS.items():
        if path.name.endswith(vocabulary):
            return path.with_name(path.name.removesuffix(vocabulary) + merges)
    return None


def description_file(path: Path) -> Path:
    """Where the description of a file of tiktoken ranks is, if there is one: NAME.tiktoken.json next to it."""
    return path.with_name(f"{path.name.removesuffix('.tiktoken')}.tiktoken.json")


def parts_of(path: Path) -> list[Path]:
    """The file, and those next to it that decide the ids too."""
    others = (merges_file(path), description_file(path))
    return [path, *(other for other in others if other is not None and other.is_file())]


def digest_of(path: Path) -> str:
    """SHA-256 of the file; of two that belong together, of both hashes. Raises OSError where one can't be read."""
    digests = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts_of(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
