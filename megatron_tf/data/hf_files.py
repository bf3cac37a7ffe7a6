"""Reads tokenizer.json and the files next to it: the parts that map text to ids, and the end of a document."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def text_to_ids_only(path: Path) -> str:
    """Remove from a tokenizer.json what changes ids after encoding: truncation, padding, dropout, post-processor.

    Raises DataError if it is not a JSON object.
    """
    content: Any = json.loads(tokenizer_json(path))
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a tokenizer.json: it is not a JSON object")
    content |= {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(content.get("model"), dict):
        content["model"].pop("dropout", None)
    return json.dumps(content, ensure_ascii=False)


def end_of_document(path: Path, tokenizer: "tokenizers.Tokenizer", eod_token: str | None) -> int:
    """Return the end-of-document id: that of `eod_token`, of the token named next to tokenizer.json, or of a
    well-known special token, in this order.

    Raises DataError if there is none. An ordinary entry of the vocabulary is never used.
    """
    if eod_token is not None:
        return _id_of(path, tokenizer, eod_token)
    named = _named_end(path.parent)
    if named is not None:
        file, token = named
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
        log.warning("%s names %r as the end of a document, which is not in %s", file, token, path)
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    known = [special[token] for token in END_OF_DOCUMENT if token in special]
    if not known:
        raise DataError(
            f"{path} does not say which token ends a document: name it with --eod-token (data.eod_token of a run), "
            f"such as one of its special tokens: {', '.join(list(special)[:20]) or 'none'}"
        )
    return known[0]


def _id_of(path: Path, tokenizer: "tokenizers.Tokenizer", token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise DataError(f"{path} has no token {token!r}: give another as --eod-token (data.eod_token of a run)")
    return int(found)


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
