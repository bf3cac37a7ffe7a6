"""Load the tokenizer of a checkpoint's model."""

from pathlib import Path

from megatron_tf.checkpoint.record import RunRecord, is_same_tokenizer
from megatron_tf.checkpoint.tokenizer_file import find_tokenizer
from megatron_tf.config import ConfigError
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.tokenizer import Tokenizer, build_tokenizer
from megatron_tf.inference.model import LanguageModel


def load_tokenizer(model: LanguageModel, moved_to: Path | None = None) -> Tokenizer:
    """Load the tokenizer from the file that the model was trained with, or from its new location.

    Raises ConfigError if it is another tokenizer, and DataError if the file is missing.
    """
    path = moved_to or find_tokenizer(model.record, model.directory)
    tokenizer = tokenizer_of(model.record, model.directory, path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
    return tokenizer


def tokenizer_of(record: RunRecord, directory: Path | None, path: Path | None) -> Tokenizer:
    """Build the tokenizer of a record, read from the checkpoint `directory`, from the file at `path`.

    Raises ConfigError if it is another tokenizer, and DataError, which says what to do, if there is no file.
    """
    kind = record.data["tokenizer_type"]
    of = "its checkpoint" if directory is None else directory
    if kind != "NullTokenizer" and (path is None or not path.is_file()):
        where = "its file is not known" if path is None else f"its file is neither {path.absolute()} nor stored in {of}"
        raise DataError(f"the model was trained with a {kind}, and {where}: pass it with --tokenizer-model")
    tokenizer = build_tokenizer(kind, path, eod_token=record.data.get("eod_token"))
    if not is_same_tokenizer(record.tokenizer, tokenizer.identity):
        raise ConfigError(
            f"{path or kind} is not the tokenizer that the model of {of} was trained with: "
            f"pass that one with --tokenizer-model"
        )
    return tokenizer
