"""What a tokenizer.json and the files next to it say, as far as it maps text to ids or names the end of a document."""

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
    """The text of a tokenizer.json, or what it would be for a vocab.json and the merges.txt next to it.

    Raises DataError where these can't be read as GPT-2's.
    """
    merges = merges_file(path)
    if merges is not None and is_pair(path):
        return json.dumps(read_pair(path, merges), ensure_ascii=False)
    return path.read_text(encoding="utf-8")


def is_pair(path: Path) -> bool:
    """Whether a file is a vocabulary whose merges are in another: named so, and not a tokenizer.json of that name."""
    if merges_file(path) is None:
        return False
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    return not (isinstance(content, dict) and isinstance(content.get("model"), dict))


def text_to_ids_only(path: Path) -> str:
    """A tokenizer.json without what cuts, fills, varies or surrounds ids: truncation, padding, dropout, post-processor.

    Raises DataError where it is no JSON object.
    """
    content: Any = json.loads(tokenizer_json(path))
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a tokenizer.json: it is not a JSON object")
    content |= {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(content.get("model"), dict):
        content["model"].pop("dropout", None)
    return json.dumps(content, ensure_ascii=False)


def end_of_document(path: Path, tokenizer: "tokenizers.Tokenizer", eod_token: str | None) -> int:
    """The id that ends a document: of `eod_token`, of what the files next to tokenizer.json name, of a special token.

    Raises DataError where none of them is known. An ordinary entry of the vocabulary is never taken for it.
    """
    if eod_token is not None:
        return _id_of(path, tokenizer, eod_token)
    named = _named_end(path.parent)
    if named is not None:
        file, token = named
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
        log.warning("%s names %r as the end, which %s does not have", file, token, path)
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    known = [special[token] for token in END_OF_DOCUMENT if token in special]
    if not known:
        raise DataError(
            f"{path} does not tell which token ends a document: name it with --eod-token (data.eod_token of a run), "
            f"such as one of its special tokens: {', '.join(list(special)[:20]) or 'none'}"
        )
    return known[0]


def _id_of(path: Path, tokenizer: "tokenizers.Tokenizer", token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise DataError(f"{path} has no token {token!r}: give another as --eod-token (data.eod_token of a run)")
    return int(found)


def _named_end(directory: Path) -> tuple[Path, str] | None:
    """(file, token) of the first file that names the end."""
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
