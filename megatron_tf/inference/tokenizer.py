"""The tokenizer that a checkpoint's model was trained with, and data that it made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.record import is_same_tokenizer
from megatron_tf.checkpoint.tokenizer_file import find_tokenizer
from megatron_tf.config import ConfigError
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.tokenizer import Tokenizer, build_tokenizer
from megatron_tf.inference.model import LanguageModel


def load_tokenizer(model: LanguageModel, moved_to: Path | None = None) -> Tokenizer:
    """From the file it was trained with, or where that has moved to. Raises ConfigError for another tokenizer, and
    DataError where the file is missing."""
    data = model.record.data
    kind = data["tokenizer_type"]
    path = moved_to or find_tokenizer(model.record, model.directory)
    check_found(kind, path, model.directory)
    tokenizer = build_tokenizer(kind, path, eod_token=data.get("eod_token"))
    if not is_same_tokenizer(model.record.tokenizer, tokenizer.identity):
        raise ConfigError("the tokenizer is not the one the model was trained with: give that with --tokenizer-model")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
    return tokenizer


def check_found(kind: str, path: Path | None, directory: Path | None) -> None:
    """Raise DataError, with what to do, unless the file of a tokenizer of this `kind` is at `path`."""
    if kind == "NullTokenizer" or (path is not None and path.is_file()):
        return
    of = "its checkpoint" if directory is None else directory
    where = "its file is not known" if path is None else f"its file is neither {path.absolute()} nor stored in {of}"
    raise DataError(f"the model was trained with a {kind}, and {where}: give it with --tokenizer-model")


def check_made_with(prefix: str | Path, tokenizer: Mapping[str, Any]) -> None:
    """Raise DataError where a data set's report PREFIX.json says that another tokenizer made it.

    `tokenizer` is the identity in a checkpoint's record. Data sets of other programs have no report.
    """
    report = Path(f"{prefix}.json")
    if not report.exists():
        return
    try:
        made_with = json.loads(report.read_bytes())["tokenizer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{report} does not say which tokenizer made the data: {error!r}") from error
    if not is_same_tokenizer(tokenizer, made_with):
        raise DataError(
            f"{prefix} was made with another tokenizer ({made_with}) than the model was trained with "
            f"({dict(tokenizer)}): choose data of that tokenizer, or preprocess the data again"
        )
