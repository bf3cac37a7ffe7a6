"""tiktoken itself, for texts that engines may cut differently: how each published encoding cuts text."""

import base64
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    ),
    "o200k_base": "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}

SPECIAL_TOKENS = {
    "r50k_base": {"<|endoftext|>": 50256},
    "cl100k_base": {
        "<|endoftext|>": 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
    "o200k_base": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
}


def tiktoken_encoder(path: Path, special_tokens: dict[str, int]) -> Callable[[Sequence[str]], list[list[int]]] | None:
    """texts -> their ids, special tokens' names as these tokens; None, and a warning, where tiktoken is missing."""
    try:
        import tiktoken
    except ImportError:
        _warn(path)
        return None
    lines = (line.split() for line in path.read_bytes().splitlines() if line.strip())
    encoding = tiktoken.Encoding(
        path.name,
        pat_str=PATTERNS[path.name.removesuffix(".tiktoken")],
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens=special_tokens,
    )

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.encode(text, allowed_special="all") for text in texts]

    return encode


@cache
def _warn(path: Path) -> None:
    log.warning(
        "%s: tiktoken is not installed; it may cut texts differently that have letters, marks or numbers which came "
        "after Unicode 3.2: pip install tiktoken",
        path,
    )
