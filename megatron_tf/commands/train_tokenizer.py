"""Train a SentencePiece tokenizer (lossless byte-pair encoding: it preserves every byte and space) on text.

Example:
    megatron-tf train-tokenizer --input 'pile/*.jsonl.zst' --vocab-size 32000 --output-prefix tokenizer
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_tf.commands.arguments import file_path, make_parser, parse, positive_int
from megatron_tf.commands.runner import command
from megatron_tf.data.documents import BadLines, Input, documents_of
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.sources import inputs_of
from megatron_tf.files import sync_directory, sync_file

MAX_LINE_BYTES = 4000  # SentencePiece skips longer lines of training text
MAX_LINE_CHARACTERS = MAX_LINE_BYTES // 4  # a character takes up to four bytes in UTF-8


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    input: list[str]
    vocab_size: int
    output_prefix: Path
    json_key: str
    max_sentences: int
    max_bad_lines: float


@command()
def main(arguments: list[str] | None = None) -> int:
    """Train the tokenizer and write PREFIX.model."""
    parser = make_parser("train-tokenizer", __doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files or patterns, as for preprocess-data")
    add("--vocab-size", type=positive_int, required=True, help="number of pieces, including bytes and special pieces")
    add("--output-prefix", type=file_path, required=True, help="path prefix of the model: PREFIX.model")
    add("--json-key", default="text", help="key of the JSON objects, or column, that holds the text")
    add(
        "--max-sentences",
        type=positive_int,
        default=100_000,
        help=f"train on the first lines of --input, this many, each cut at {MAX_LINE_CHARACTERS:,} characters",
    )
    add("--max-bad-lines", type=float, default=0.001, help="fail if more than this fraction of the lines is invalid")
    options = parse(parser, Options, arguments)
    if not 0 <= options.max_bad_lines <= 1:  # nan too
        parser.error(f"--max-bad-lines is a fraction from 0 to 1, not {options.max_bad_lines}")
    train(options)
    return 0


def train(options: Options) -> None:
    """Train and write the model. Raises DataError for missing text, invalid input, and errors of SentencePiece."""
    text = Text(inputs_of(options.input), options.json_key)
    lines = itertools.islice(text, options.max_sentences)
    first = next(lines, None)
    text.check(options.max_bad_lines)
    if first is None:
        raise DataError(f"no text under {options.json_key!r} in {', '.join(options.input)}")
    options.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{options.output_prefix}.model.tmp")
    try:
        with temporary.open("wb") as file:
            fit(itertools.chain([first], lines), file, options.vocab_size)
            sync_file(file)
        text.check(options.max_bad_lines)
        temporary.replace(f"{options.output_prefix}.model")
        sync_directory(temporary.parent)
    except RuntimeError as error:
        # an error in the input is more helpful than SentencePiece's error about the rest
        text.check(options.max_bad_lines)
        raise DataError(_explain(error, options.vocab_size)) from error
    finally:
        temporary.unlink(missing_ok=True)
    at_most = " (--max-sentences)" if text.lines == options.max_sentences else ""
    print(
        f"{options.output_prefix}.model: {options.vocab_size:,} pieces, from {text.lines:,} lines{at_most}, of which "
        f"{text.cut:,} were cut at {MAX_LINE_CHARACTERS:,} characters"
    )


def _explain(error: RuntimeError, vocab_size: int) -> str:
    """Return SentencePiece's error without places in its code, and without advice to set an option that is not ours."""
    reason = str(error).rpartition("] ")[2].partition(" or decrease character_coverage")[0].strip()
    return f"--vocab-size {vocab_size}: {reason}" if "ocabulary size" in reason else str(error)


def fit(lines: Iterator[str], file: BinaryIO, vocab_size: int) -> None:
    """Train on lines and write the model. Raises SentencePiece's RuntimeError."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=file,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=MAX_LINE_BYTES,
        num_threads=2,
        minloglevel=2,  # its warnings repeat its errors
    )


class Text(Iterator[str]):
    """Iterates over non-empty lines of the documents, truncating long ones. An error ends the iteration and is stored,
    because SentencePiece would wrap it in its own error."""

    def __init__(self, inputs: list[Input], key: str) -> None:
        self.bad = BadLines()
        self.error: Exception | None = None
        self.lines = self.cut = 0
        self._documents = documents_of(inputs, [key], self.bad)
        self._lines = self._split(key)

    def __next__(self) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise StopIteration from None

    def check(self, max_bad_lines: float) -> None:
        """Raise the error that ended the lines, or DataError if too many of those read were bad."""
        if self.error is not None:
            raise self.error
        self.bad.check(max_bad_lines)

    def _split(self, key: str) -> Iterator[str]:
        for document in self._documents:
            for line in document[key].splitlines():
                if line.strip():
                    self.lines += 1
                    self.cut += len(line) > MAX_LINE_CHARACTERS
                    yield line[:MAX_LINE_CHARACTERS]
