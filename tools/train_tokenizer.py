"""Train a SentencePiece tokenizer (byte-pair encoding that keeps every byte and space) on Pile shards."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_tf.data.documents import BadLines, read_documents
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.interrupt import run_command

MAX_LINE_BYTES = 4000  # SentencePiece skips longer lines of training text


def main(arguments: list[str] | None = None) -> int:
    """0 when PREFIX.model is written, 1 after an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", type=Path, required=True, help=".jsonl, .jsonl.gz or .jsonl.zst files")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, bytes and special ones included")
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.model")
    parser.add_argument("--json-key", default="text", help="the text of a line")
    parser.add_argument("--max-sentences", type=int, default=100_000, help="lines of text to train on, at most")
    args = parser.parse_args(arguments)
    try:
        train(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(args: argparse.Namespace) -> None:
    """Train and write the model. Raises DataError for no text, RuntimeError as SentencePiece does."""
    import sentencepiece

    lines = itertools.islice(text_lines(args.input, args.json_key), args.max_sentences)
    first = next(lines, None)
    if first is None:
        raise DataError(f"no text under {args.json_key!r} in {', '.join(map(str, args.input))}")
    args.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{args.output_prefix}.model.tmp")
    with temporary.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=file,
            vocab_size=args.vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=2,
            minloglevel=1,
        )
    temporary.replace(f"{args.output_prefix}.model")
    print(f"{args.output_prefix}.model: {args.vocab_size:,} pieces")


def text_lines(paths: list[Path], key: str) -> Iterator[str]:
    """Non-empty lines of the documents, with long ones cut."""
    bad = BadLines()
    for document in read_documents(paths, [key], bad):
        for line in document[key].splitlines():
            if line.strip():
                yield line[: MAX_LINE_BYTES // 4]
    bad.check(0.001)


if __name__ == "__main__":
    sys.exit(run_command(main))
