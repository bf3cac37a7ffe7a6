"""From Pile shards to data sets: every input becomes a part, parts become PREFIX_KEY_document.bin and .idx."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import megatron_tf
from megatron_tf.data.document_sets import joined_sets, sets_path
from megatron_tf.data.documents import BadLines, Batch, read_batches
from megatron_tf.data.indexed_dataset import DataError, blocks_of_documents, token_dtype, write_index
from megatron_tf.data.part import Count, Journal, Part
from megatron_tf.data.tokenizer import Encoded, Tokenizer

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""(bytes of the input, documents) since the last call."""

COMMIT_BYTES = 256 << 20  # of lines: what a kill can cost
FORMAT_VERSION = 1  # of the bytes that the same input gives


@dataclass(frozen=True)
class Settings:
    """What decides the data sets besides the inputs."""

    tokenizer: dict[str, Any]
    """Identity of the tokenizer."""
    keys: tuple[str, ...]
    append_eod: bool
    split_by_meta: str | None
    """Key under `meta` whose values each get data sets of their own."""

    def identity(self, path: Path) -> dict[str, Any]:
        """Everything that decides the bytes one input becomes."""
        status = path.stat()
        file = {"input": str(path), "size": status.st_size, "modified": status.st_mtime_ns}
        return {"format": FORMAT_VERSION, **file, **json.loads(json.dumps(asdict(self)))}


def parts_directory(prefix: str) -> Path:
    """Where unfinished work on the data sets of a prefix lies."""
    return Path(f"{prefix}.parts")


def tokenize_input(
    path: Path, number: int, prefix: str, settings: Settings, tokenizer: Tokenizer, progress: Progress
) -> None:
    """Make one input into part `number`, or go on with it. Raises DataError or OSError; committed work survives."""
    dtype = token_dtype(tokenizer.vocab_size)
    with Part(parts_directory(prefix) / f"{number:05d}", settings.identity(path), dtype) as part:
        journal = part.journal
        if journal.is_complete:
            progress(path.stat().st_size, sum(journal.total(output).documents for output in journal.counts))
            return
        done, uncommitted = 0, 0
        for batch in _read_ahead(read_batches(path, settings.keys, journal.lines)):
            _add(part, batch, settings, tokenizer)
            progress(batch.end_byte - done, len(batch.documents))
            done = batch.end_byte
            uncommitted += batch.line_bytes
            if uncommitted >= COMMIT_BYTES:
                part.commit()
                uncommitted = 0
        part.commit(is_complete=True)


def _add(part: Part, batch: Batch, settings: Settings, tokenizer: Tokenizer) -> None:
    sets = [_set_name(document, settings.split_by_meta or "pile_set_name") for document in batch.documents]
    for key in settings.keys:
        texts = [document[key] for document in batch.documents]
        if not texts:
            continue
        encoded = tokenizer.encode_batch(texts)
        encoded = Encoded(encoded.ids.astype(part.dtype), encoded.lengths)
        if settings.append_eod:
            encoded = _with_end(encoded, tokenizer.eod)
        for output, which in _outputs(key, sets, settings).items():
            chosen = encoded if len(which) == len(texts) else encoded.chosen(which)
            lengths = chosen.lengths.tolist()
            documents = [(sets[i], length, _utf8_size(texts[i])) for i, length in zip(which, lengths, strict=True)]
            part.append(output, chosen.ids, documents)
    part.journal.lines = batch.end_line
    part.journal.bad.merge(batch.bad)


def _with_end(encoded: Encoded, eod: int) -> Encoded:
    """Each text followed by the end of a document; an empty one stays empty, as Megatron-LM's standard tool has it."""
    has_tokens = encoded.lengths > 0
    ends = np.cumsum(encoded.lengths)[has_tokens]
    return Encoded(np.insert(encoded.ids, ends, eod), encoded.lengths + has_tokens)


def _outputs(key: str, sets: list[str], settings: Settings) -> dict[str, list[int]]:
    """Output -> which of a batch's documents go there."""
    if settings.split_by_meta is None:
        return {key: list(range(len(sets)))}
    outputs: dict[str, list[int]] = {}
    for i, name in enumerate(sets):
        outputs.setdefault(f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}_{key}", []).append(i)
    return outputs


def _set_name(document: dict[str, Any], key: str) -> str:
    meta = document.get("meta")
    return str(meta.get(key, "unknown")) if isinstance(meta, dict) else "unknown"


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _read_ahead(iterator: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        pending = reader.submit(next, iterator, None)
        while (item := pending.result()) is not None:
            pending = reader.submit(next, iterator, None)
            yield item


def assemble(
    inputs: Sequence[Path], prefix: str, settings: Settings, dtype: np.dtype, max_bad_lines: float
) -> dict[str, Any]:
    """Put the parts of all inputs together, in their order, and return the report that is written to PREFIX.json.

    Raises DataError where a part is not complete, too many lines are bad or there is no document at all.
    """
    parts = [
        Part(parts_directory(prefix) / f"{number:05d}", settings.identity(path), dtype)
        for number, path in enumerate(inputs)
    ]
    for path, part in zip(inputs, parts, strict=True):
        if not part.journal.is_complete:
            raise DataError(f"{path} has not been tokenized completely: run the same command again to go on")
    bad = BadLines()
    for part in parts:
        bad.merge(part.journal.bad)
    bad.check(max_bad_lines)
    outputs = sorted({output for part in parts for output in part.journal.counts})
    if not outputs:
        raise DataError(f"no document in {', '.join(map(str, inputs))}: is --json-keys right?")
    report = {
        "version": megatron_tf.__version__,
        "settings": json.loads(json.dumps(asdict(settings))),
        "inputs": [settings.identity(path) for path in inputs],
        "bad_lines": {kind: {"count": n, "first": bad.first[kind]} for kind, n in bad.counts.items()},
        "data_sets": {},
    }
    for output in outputs:
        data_set = f"{prefix}_{output}_document"
        report["data_sets"][data_set] = _publish(data_set, [p for p in parts if output in p.journal.counts], output)
    write_json(Path(f"{prefix}.json"), report)
    shutil.rmtree(parts_directory(prefix))
    return report


def finished_report(inputs: Sequence[Path], prefix: str, settings: Settings) -> dict[str, Any] | None:
    """The report of a run that has made just these data sets already. Raises DataError where others are in the way."""
    path = Path(f"{prefix}.json")
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text())
    if report.get("inputs") == [settings.identity(i) for i in inputs]:
        return report
    raise DataError(
        f"{path} tells of data sets made from other inputs or with other settings: "
        f"remove it and them, or choose another --output-prefix"
    )


def _publish(data_set: str, parts: list[Part], output: str) -> dict[str, Any]:
    """One data set from its parts; its index appears last."""
    journals = [part.journal for part in parts]
    report = {"tokenizer": journals[0].identity["tokenizer"], **_counts(journals, output)}
    data, index = Path(f"{data_set}.bin.tmp"), Path(f"{data_set}.idx.tmp")
    concatenate([part.paths(output)[0] for part in parts], data)
    lengths = np.concatenate([np.fromfile(part.paths(output)[1], dtype="<i4") for part in parts])
    write_index(index, parts[0].dtype, blocks_of_documents(lengths))
    sets = Path(f"{sets_path(data_set)}.tmp")
    joined_sets([part.document_sets(output) for part in parts]).write(sets)
    write_json(Path(f"{data_set}.json"), report)
    sets.replace(sets_path(data_set))
    data.replace(f"{data_set}.bin")
    index.replace(f"{data_set}.idx")
    return report


def _counts(journals: list[Journal], output: str) -> dict[str, Any]:
    total, sets = Count(), dict[str, Count]()
    for journal in journals:
        for name, count in journal.counts.get(output, {}).items():
            sets.setdefault(name, Count()).add(count.documents, count.tokens, count.text_bytes)
            total.add(count.documents, count.tokens, count.text_bytes)
    return {**asdict(total), "pile_sets": {name: asdict(count) for name, count in sorted(sets.items())}}


def concatenate(sources: list[Path], target: Path) -> None:
    """The bytes of files one after another; a second name for the file where it is only one."""
    target.unlink(missing_ok=True)
    if len(sources) == 1:
        with suppress(OSError):  # a file system without hard links: copy
            os.link(sources[0], target)
    if target.exists():
        return
    with target.open("wb") as file:
        for source in sources:
            with source.open("rb") as part:
                shutil.copyfileobj(part, file, 16 << 20)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


@contextmanager
def exclusive(prefix: str) -> Iterator[None]:
    """Hold the work on a prefix. Raises DataError where another process holds it."""
    directory = parts_directory(prefix)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing {prefix}: wait for it, or choose another prefix") from None
        yield
