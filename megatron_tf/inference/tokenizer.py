"""The tokenizer that a checkpoint's model was trained with."""

from pathlib import Path

from megatron_tf.config import ConfigError
from megatron_tf.data.tokenizer import Tokenizer, build_tokenizer
from megatron_tf.inference.model import LanguageModel


def load_tokenizer(model: LanguageModel, moved_to: Path | None = None) -> Tokenizer:
    """From the file it was trained with, or where that has moved to. Raises ConfigError for another tokenizer, and
    DataError where the file is missing."""
    data = model.metadata["config"]["data"]
    trained_with = Path(data["tokenizer_model"]) if data["tokenizer_model"] else None
    tokenizer = build_tokenizer(data["tokenizer_type"], moved_to or trained_with, eod_token=data.get("eod_token"))
    if tokenizer.identity != model.metadata["tokenizer"]:
        raise ConfigError("the tokenizer is not the one the model was trained with: give that with --tokenizer-model")
    return tokenizer
