"""Reads tokenizer.json and the files next to it: the parts that map text to ids, and the end of a document."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from megatron_tf.data.gpt2_files import read_pair
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.tokenizer_files import NAMING_FILES, merges_file

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


def tokenizer_json(path: Path) -> str:
    """Return the text of a tokenizer.json, or of the equivalent one for a vocab.json with merges.txt next to it.

    Raises DataError if these are not GPT-2's files.
    """
    merges = merges_file(path)
    if merges is not None and is_pair(path):
        return json.dumps(read_pair(path, merges), ensure_ascii=False)
    return path.read_text(encoding="utf-8")


def is_pair(path: Path) -> bool:
    """Return whether a file is a vocabulary with separate merges: by its name, unless it contains a tokenizer.json."""
    if merges_file(path) is None:
        return False
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    return not (isinstance(content, dict) and isinstance(content.get("model"), dict))


class TextToIds(NamedTuple):
    """What of a tokenizer.json maps text to ids."""

    json: bytes
    """The file without truncation, padding, dropout and post-processor, which change ids after encoding."""
    special_tokens: dict[str, int]


def text_to_ids_only(path: Path) -> TextToIds:
    """Read what maps text to ids. Raises DataError if the file is not a JSON object."""
    content: Any = orjson.loads(tokenizer_json(path))
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a tokenizer.json: it is not a JSON object")
    content |= {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(content.get("model"), dict):
        content["model"].pop("dropout", None)
    added = content.get("added_tokens") or []
    return TextToIds(orjson.dumps(content), {token["content"]: token["id"] for token in added if token.get("special")})


def special_tokens_of(tokenizer: "tokenizers.Tokenizer") -> dict[str, int]:
    """Return the special tokens of a loaded tokenizer with their ids."""
    return {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def end_of_document(
    path: Path, special_tokens: Mapping[str, int], id_of: Callable[[str], int | None], eod_token: str | None
) -> int:
    """Return the end-of-document id: that of `eod_token`, of the token named next to tokenizer.json, or of a
    well-known special token, in this order. `id_of` returns the id of any token.

    Raises DataError if there is none. An ordinary entry of the vocabulary is never used.
    """
    if eod_token is not None:
        found = id_of(eod_token)
        if found is None:
            raise DataError(f"{path} has no token {eod_token!r}: give another as --eod-token (data.eod_token of a run)")
        return found
    named = _named_end(path.parent)
    if named is not None:
        file, token = named
        found = id_of(token)
        if found is not None:
            return found
        log.warning("%s names %r as the end of a document, which is not in %s", file, token, path)
    known = [special_tokens[token] for token in END_OF_DOCUMENT if token in special_tokens]
    if not known:
        raise DataError(
            f"{path} does not say which token ends a document: name it with --eod-token (data.eod_token of a run), "
            f"such as one of its special tokens: {', '.join(list(special_tokens)[:20]) or 'none'}"
        )
    return known[0]


def _named_end(directory: Path) -> tuple[Path, str] | None:
    """Return (file, token) of the first file that names the end of a document."""
    for name in NAMING_FILES:
        path = directory / name
        if not path.is_file():
            continue
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path} is not a JSON object ({error}): fix it, or move the tokenizer away") from error
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if isinstance(token, str):
            return path, token
    return None
