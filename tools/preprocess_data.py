"""Turn Pile shards into Megatron's indexed datasets: PREFIX_KEY_document.bin and .idx, with a report beside them."""

import argparse
import json
import multiprocessing
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

import megatron_tf
from megatron_tf.data.documents import BadLines, read_documents
from megatron_tf.data.indexed_dataset import DataError, IndexedDatasetWriter, token_dtype
from megatron_tf.data.tokenizer import TYPES, Tokenizer, build_tokenizer

T = TypeVar("T")
BATCH_DOCUMENTS = 64  # documents a worker tokenizes at a time


def main(arguments: list[str] | None = None) -> int:
    """0 when every data set is complete, 1 after an error."""
    args = parse_arguments(arguments)
    try:
        preprocess(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; names follow Megatron-LM's tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", type=Path, required=True, help=".jsonl, .jsonl.gz or .jsonl.zst files")
    parser.add_argument("--output-prefix", required=True, help="where the data sets go: PREFIX_text_document.bin")
    parser.add_argument("--tokenizer-type", required=True, help=", ".join(TYPES))
    parser.add_argument("--tokenizer-model", type=Path, help="the tokenizer's file")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="texts to take from each line")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document id")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--log-interval", type=int, default=10000, help="documents between lines of a log")
    parser.add_argument(
        "--max-bad-lines",
        type=float,
        default=0.001,
        help="fraction of lines that may be bad before it is an error",
    )
    return parser.parse_args(arguments)


def preprocess(args: argparse.Namespace) -> None:
    """Tokenize every document and write the data sets. Raises DataError or OSError; nothing half-done stays."""
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
    bad, tally = BadLines(), Tally(args.json_keys)
    prefixes = {key: f"{args.output_prefix}_{key}_document" for key in args.json_keys}
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedDatasetWriter(prefix, token_dtype(tokenizer.vocab_size)))
            for key, prefix in prefixes.items()
        }
        bar = stack.enter_context(tqdm(unit="doc", disable=not sys.stderr.isatty()))
        for texts, ids, source in tokenized(args, tokenizer, bad):
            for key, writer in writers.items():
                writer.add_document(ids[key])
            tally.add(texts, ids, source)
            bar.update()
            if bar.disable and tally.documents % args.log_interval == 0:
                print(f"{tally.documents:,} documents", flush=True)
        bad.check(args.max_bad_lines)
        if tally.documents == 0:
            raise DataError(f"no document in {', '.join(map(str, args.input))}: is --json-keys right?")
    for key, prefix in prefixes.items():
        report = tally.report(key, bad, tokenizer)
        Path(f"{prefix}.json").write_text(json.dumps(report, indent=1))
        print(f"{prefix}: {report['documents']:,} documents, {report['tokens']:,} tokens")
    if bad.counts:
        print(f"skipped bad lines:\n{bad.summary()}")


class Tally:
    """What went into the data sets."""

    def __init__(self, keys: list[str]) -> None:
        self.documents = 0
        self.tokens: Counter[str] = Counter(dict.fromkeys(keys, 0))
        self.bytes: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()

    def add(self, texts: dict[str, str], ids: dict[str, list[int]], source: str) -> None:
        """Count a document."""
        self.documents += 1
        self.sources[source] += 1
        for key, text in texts.items():
            self.tokens[key] += len(ids[key])
            self.bytes[key] += len(text.encode(errors="replace"))

    def report(self, key: str, bad: BadLines, tokenizer: Tokenizer) -> dict[str, Any]:
        """The report of one data set."""
        return {
            "version": megatron_tf.__version__,
            "tokenizer": tokenizer.identity,
            "documents": self.documents,
            "tokens": self.tokens[key],
            "bytes": self.bytes[key],
            "documents_by_pile_set_name": dict(self.sources),
            "bad_lines": {kind: {"count": n, "first": bad.first[kind]} for kind, n in bad.counts.items()},
        }


Item = tuple[dict[str, str], str]


def tokenized(
    args: argparse.Namespace, tokenizer: Tokenizer, bad: BadLines
) -> Iterator[tuple[dict[str, str], dict[str, list[int]], str]]:
    """(texts, ids, pile_set_name) of each document, in the order of the input whatever the number of workers."""
    batches = batched(read_documents(args.input, args.json_keys, bad), args.json_keys)
    if args.workers == 1:
        worker = Worker(tokenizer, args.append_eod)
        encoded = ((items, worker(items)) for items in batches)
        yield from unbatched(encoded)
        return
    setup = (args.tokenizer_type, args.tokenizer_model, args.append_eod)
    with multiprocessing.Pool(args.workers, initializer=_start_worker, initargs=setup) as pool:
        room = threading.Semaphore(4 * args.workers)
        results = pool.imap(_run_worker, throttled(batches, room))
        yield from unbatched(_release_after(result, room) for result in results)


def throttled(batches: Iterator[list[Item]], room: threading.Semaphore) -> Iterator[list[Item]]:
    """The batches, as fast as `room` for them is made: Pool.imap alone would read the whole input into memory."""
    for batch in batches:
        room.acquire()
        yield batch


def _release_after(result: T, room: threading.Semaphore) -> T:
    room.release()
    return result


def batched(documents: Iterator[dict[str, Any]], keys: list[str]) -> Iterator[list[Item]]:
    """Texts and source of documents, some at a time."""
    items = (({key: d[key] for key in keys}, _source(d)) for d in documents)
    while batch := list(islice(items, BATCH_DOCUMENTS)):
        yield batch


def unbatched(
    encoded: Iterator[tuple[list[Item], list[dict[str, list[int]]]]],
) -> Iterator[tuple[dict[str, str], dict[str, list[int]], str]]:
    """One document at a time again."""
    for items, ids in encoded:
        for (texts, source), document in zip(items, ids, strict=True):
            yield texts, document, source


class Worker:
    """Tokenizes batches of documents."""

    def __init__(self, tokenizer: Tokenizer, append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.end = [tokenizer.eod] if append_eod else []

    def __call__(self, items: list[Item]) -> list[dict[str, list[int]]]:
        """Ids of each document by key; none at all, not even the end, where the text is empty."""
        keys = list(items[0][0])
        columns = [self.tokenizer.encode_batch([texts[key] for texts, _ in items]) for key in keys]
        return [
            {key: ids + self.end if ids else [] for key, ids in zip(keys, row, strict=True)}
            for row in zip(*columns, strict=True)
        ]


_process: dict[str, Worker] = {}  # a pool's process keeps its tokenizer here: multiprocessing gives no other place


def _start_worker(tokenizer_type: str, tokenizer_model: Path | None, append_eod: bool) -> None:
    _process["worker"] = Worker(build_tokenizer(tokenizer_type, tokenizer_model), append_eod)


def _run_worker(items: list[Item]) -> tuple[list[Item], list[dict[str, list[int]]]]:
    return items, _process["worker"](items)


def _source(document: dict[str, Any]) -> str:
    meta = document.get("meta")
    return str(meta.get("pile_set_name", "unknown")) if isinstance(meta, dict) else "unknown"


if __name__ == "__main__":
    sys.exit(main())
