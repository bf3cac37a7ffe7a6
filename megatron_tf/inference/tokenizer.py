"""The tokenizer that a checkpoint's model was trained with, and data that it made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.record import RunRecord, is_same_tokenizer
from megatron_tf.checkpoint.tokenizer_file import find_tokenizer
from megatron_tf.config import ConfigError
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.published import report_of
from megatron_tf.data.tokenizer import Tokenizer, build_tokenizer
from megatron_tf.inference.model import LanguageModel


def load_tokenizer(model: LanguageModel, moved_to: Path | None = None) -> Tokenizer:
    """Load it from the file the model was trained with, or from where that has moved to.

    Raises ConfigError for another tokenizer, and DataError where the file is missing.
    """
    path = moved_to or find_tokenizer(model.record, model.directory)
    tokenizer = tokenizer_of(model.record, model.directory, path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
    return tokenizer


def tokenizer_of(record: RunRecord, directory: Path | None, path: Path | None) -> Tokenizer:
    """Build the tokenizer of a record, read from the checkpoint `directory`, from the file at `path`.

    Raises ConfigError where that is another tokenizer, and DataError, with what to do, where there is no file.
    """
    kind = record.data["tokenizer_type"]
    of = "its checkpoint" if directory is None else directory
    if kind != "NullTokenizer" and (path is None or not path.is_file()):
        where = "its file is not known" if path is None else f"its file is neither {path.absolute()} nor stored in {of}"
        raise DataError(f"the model was trained with a {kind}, and {where}: give it with --tokenizer-model")
    tokenizer = build_tokenizer(kind, path, eod_token=record.data.get("eod_token"))
    if not is_same_tokenizer(record.tokenizer, tokenizer.identity):
        raise ConfigError(
            f"{path or kind} is not the tokenizer that the model of {of} was trained with: "
            f"give that with --tokenizer-model"
        )
    return tokenizer


def check_made_with(prefix: str | Path, tokenizer: Mapping[str, Any]) -> None:
    """Raise DataError where a dataset's report PREFIX.json says that another tokenizer made it.

    `tokenizer` is the identity in a checkpoint's record. Datasets of other programs have no report.
    """
    report = report_of(prefix)
    if report is not None and not is_same_tokenizer(tokenizer, report["tokenizer"]):
        raise DataError(
            f"{prefix} was made with another tokenizer ({report['tokenizer']}) than the model was trained with "
            f"({dict(tokenizer)}): choose data of that tokenizer, or preprocess the data again"
        )
