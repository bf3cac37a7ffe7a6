"""Remembers for which tokenizers the fast engine has reproduced the library, so that not every process checks it again.

A verdict is an empty file in the user's cache directory ($XDG_CACHE_HOME, by default ~/.cache). Its name is a hash of
all that the check depends on: the tokenizer, the texts of the check, and the two libraries.
"""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def is_known_good(content: bytes, probes: Sequence[str]) -> bool:
    """Return whether a tokenizer with this content has passed the check with these libraries before."""
    path = _verdict(content, probes)
    return path is not None and path.is_file()


def remember_good(content: bytes, probes: Sequence[str]) -> None:
    """Remember that a tokenizer passed the check. Without a writable cache directory every process checks it."""
    path = _verdict(content, probes)
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def _verdict(content: bytes, probes: Sequence[str]) -> Path | None:
    """Return the file whose existence is the verdict; None if the user has no home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    facts = [
        hashlib.sha256(content).digest(),
        *probes,
        *map(_build_of, ("gigatoken.gigatoken_rs", "tokenizers.tokenizers")),
    ]
    return cache / "megatron_tf" / "engines" / hashlib.sha256(repr(facts).encode()).hexdigest()


def _build_of(module: str) -> str:
    """Identify the build of an extension module by its file."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return "missing"
    state = Path(found.origin).stat()
    return f"{found.origin} {state.st_size} {state.st_mtime_ns}"
