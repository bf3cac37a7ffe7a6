"""Converts GPT-2's vocab.json and merges.txt to the equivalent tokenizer.json."""

import json
from pathlib import Path
from typing import Any

from megatron_tf.data.indexed_dataset import DataError

_END = "<|endoftext|>"
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")


def read_pair(vocabulary: Path, merges: Path) -> dict[str, Any]:
    """Return the contents of the equivalent tokenizer.json: byte-level BPE that splits text as GPT-2 does, with the
    special token `<|endoftext|>`.

    Raises DataError if a file is missing or malformed, or if a file next to them adds tokens or names a tokenizer that
    splits text differently.
    """
    _check_kind(vocabulary)
    tokens = _tokens(vocabulary)
    added = [{"id": tokens[_END], "content": _END, "special": True}] if _END in tokens else []
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, **plain} for token in added],
        "normalizer": None,
        "pre_tokenizer": bytes_,
        "post_processor": None,
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokens,
            "merges": _merges(merges, tokens),
        },
    }


def _tokens(path: Path) -> dict[str, int]:
    content = json.loads(path.read_text(encoding="utf-8"))
    is_right = isinstance(content, dict) and all(type(i) is int and i >= 0 for i in content.values())
    if not is_right or len(set(content.values())) < len(content):
        raise DataError(f"{path} is not a vocabulary: it must map each token to a unique id")
    return dict(content)


def _merges(path: Path, tokens: dict[str, int]) -> list[list[str]]:
    if not path.is_file():
        raise DataError(f"{path} is missing: put it next to the vocabulary, or use a tokenizer.json")
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= tokens.keys():
            raise DataError(f"{path}:{number}: {line[:40]!r} is not a merge of two tokens of the vocabulary")
        merges.append(pair)
    return merges


def _check_kind(vocabulary: Path) -> None:
    remedy = "use the tokenizer.json of the same model"
    added = vocabulary.with_name("added_tokens.json")
    if added.is_file():
        raise DataError(f"{added} adds tokens to {vocabulary.name}, which is not supported: {remedy}")
    path = vocabulary.with_name("tokenizer_config.json")
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    kind = content.get("tokenizer_class") if isinstance(content, dict) else None
    if kind is not None and kind not in _CLASSES and not _is_cut_alike(vocabulary.with_name("tokenizer.json")):
        raise DataError(f"{path} belongs to a {kind}, which may split text differently from GPT-2: {remedy}")


def _is_cut_alike(path: Path) -> bool:
    """Return whether there is also a tokenizer.json that splits text as GPT-2 does, as in our own exports."""
    if not path.is_file():
        return False
    content = json.loads(path.read_text(encoding="utf-8"))
    cut = content.get("pre_tokenizer") if isinstance(content, dict) else None
    if not isinstance(cut, dict) or content.get("normalizer") is not None:
        return False
    return cut.get("type") == "ByteLevel" and cut.get("use_regex") is not False and not cut.get("add_prefix_space")
