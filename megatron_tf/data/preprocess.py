"""From Pile shards to datasets: every input becomes a part, parts become PREFIX_KEY_document.bin and .idx."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import megatron_tf
from megatron_tf.data.document_sets import joined_sets, sets_path
from megatron_tf.data.documents import BadLines, DocumentBatch, check_any, read_batches
from megatron_tf.data.first_format import check_first_ends, check_first_format, is_of_first_format
from megatron_tf.data.indexed_dataset import DataError, blocks_of_documents, token_dtype, write_index
from megatron_tf.data.output_names import dataset_names, output_of, set_name
from megatron_tf.data.part import Journal, Part, Tally
from megatron_tf.data.published import (
    claim,
    exclusive,
    missing_file,
    parts_directory,
    read_report,
    remove_parts,
)
from megatron_tf.data.tokenizer import Encoded, Tokenizer
from megatron_tf.files import concatenate, write_json

T = TypeVar("T")
ReportProgress = Callable[[int, int], None]
"""(bytes of the input, documents) since the last call."""

UNKNOWN_SET = "unknown"  # of documents that don't say
COMMIT_BYTES = 256 << 20  # of lines: what a kill can cost
FORMAT_VERSION = 2  # of the bytes that the same input gives


@dataclass(frozen=True)
class Settings:
    """What decides the datasets besides the inputs."""

    tokenizer: dict[str, Any]
    """Identity of the tokenizer."""
    keys: tuple[str, ...]
    append_eod: bool
    split_by_meta: str | None
    """Key under `meta` whose values each get datasets of their own."""
    eod: int | None = None
    """The id that ends documents."""

    def identity(self, path: Path) -> dict[str, Any]:
        """Everything that decides the bytes one input becomes."""
        status = path.stat()
        file = {"input": str(path), "size": status.st_size, "modified": status.st_mtime_ns}
        # as JSON would give it back, with lists for tuples: it is compared with what was read from a journal
        return {"format": FORMAT_VERSION, **file, **json.loads(json.dumps(asdict(self)))}


def tokenize_input(
    path: Path, number: int, *, prefix: str, settings: Settings, tokenizer: Tokenizer, progress: ReportProgress
) -> None:
    """Make one input into part `number`, or resume it. Raises DataError or OSError; committed work survives."""
    dtype = token_dtype(tokenizer.vocab_size)
    with Part(parts_directory(prefix) / f"{number:05d}", settings.identity(path), dtype) as part:
        journal = part.journal
        if journal.is_complete:
            progress(path.stat().st_size, journal.num_documents)
            return
        done = 0
        uncommitted = 0
        for batch in _read_ahead(read_batches(path, settings.keys, journal.lines)):
            _add(part, batch, settings=settings, tokenizer=tokenizer)
            progress(batch.end_byte - done, len(batch.documents))
            done = batch.end_byte
            uncommitted += batch.line_bytes
            if uncommitted >= COMMIT_BYTES:
                part.commit()
                uncommitted = 0
        check_any(path, journal.num_documents, journal.bad)
        part.commit(is_complete=True)


def _add(part: Part, batch: DocumentBatch, *, settings: Settings, tokenizer: Tokenizer) -> None:
    sets = [_set_name(document, settings.split_by_meta or "pile_set_name") for document in batch.documents]
    for key in settings.keys:
        texts = [document[key] for document in batch.documents]
        if not texts:
            continue
        encoded = _encoded(texts, part.dtype, tokenizer)
        if settings.eod is not None:
            encoded = _with_end(encoded, settings.eod)
        for output, which in _outputs(key, sets, settings).items():
            # the usual case of one set in a batch copies nothing
            chosen = encoded if len(which) == len(texts) else encoded.chosen(which)
            lengths = chosen.lengths.tolist()
            documents = [
                (sets[i] or UNKNOWN_SET, length, _utf8_size(texts[i])) for i, length in zip(which, lengths, strict=True)
            ]
            part.append(output, chosen.ids, documents)
    part.journal.lines = batch.end_line
    part.journal.without_set += sets.count(None)
    part.journal.bad.merge(batch.bad, set(part.journal.bad.counts))


def _encoded(texts: list[str], dtype: np.dtype, tokenizer: Tokenizer) -> Encoded:
    encoded = tokenizer.encode_batch(texts)
    highest = int(encoded.ids.max(initial=0))
    if highest >= tokenizer.vocab_size:  # it would wrap around in a smaller type
        raise DataError(f"the tokenizer gave id {highest:,}, its vocabulary has {tokenizer.vocab_size:,}: report this")
    return Encoded(encoded.ids.astype(dtype), encoded.lengths)


def _with_end(encoded: Encoded, eod: int) -> Encoded:
    """Each text followed by the end of a document; an empty one stays empty, as Megatron-LM's standard tool has it."""
    has_tokens = encoded.lengths > 0
    ends = np.cumsum(encoded.lengths)[has_tokens]
    return Encoded(np.insert(encoded.ids, ends, eod), encoded.lengths + has_tokens)


def _outputs(key: str, sets: list[str | None], settings: Settings) -> dict[str, list[int]]:
    """Output -> which of a batch's documents go there."""
    if settings.split_by_meta is None:
        return {output_of(key, None): list(range(len(sets)))}
    outputs: dict[str, list[int]] = {}
    for i, name in enumerate(sets):
        outputs.setdefault(output_of(key, name or UNKNOWN_SET), []).append(i)
    return outputs


def _set_name(document: dict[str, Any], key: str) -> str | None:
    meta = document.get("meta")
    return set_name(meta[key]) if isinstance(meta, dict) and key in meta else None


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _read_ahead(iterator: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        # None for the end: no item is None
        pending = reader.submit(next, iterator, None)
        while (item := pending.result()) is not None:
            pending = reader.submit(next, iterator, None)
            yield item


def assemble(
    inputs: Sequence[Path], prefix: str, settings: Settings, *, dtype: np.dtype, max_bad_lines: float
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
    outputs = sorted(set().union(*(part.journal.counts for part in parts)))
    names = dataset_names(prefix, outputs, is_split=settings.split_by_meta is not None)
    claim(prefix, names.values())
    report = {
        "version": megatron_tf.__version__,
        "settings": json.loads(json.dumps(asdict(settings))),
        "inputs": [settings.identity(path) for path in inputs],
        "bad_lines": {
            kind: {"count": n, "bytes": bad.bytes[kind], "shards": bad.shards[kind], "first": bad.first[kind]}
            for kind, n in bad.counts.items()
        },
        "documents": sum(part.journal.num_documents for part in parts) // len(settings.keys),
        "without_set": sum(part.journal.without_set for part in parts),
        "data_sets": {},
    }
    for output, name in names.items():
        made_of = [part for part in parts if output in part.journal.counts]
        report["data_sets"][name] = _publish(name, made_of, output)
    write_json(Path(f"{prefix}.json"), report)  # which syncs the directory of the datasets too: then parts may go
    remove_parts(prefix)
    return report


def finished_report(
    inputs: Sequence[Path], prefix: str, settings: Settings, *, tokenizer_model: Path | None = None
) -> dict[str, Any] | None:
    """The report of a command that has made just these datasets, which are all there; what it left over is removed.

    None where one of them is gone. Raises DataError where other datasets, or other files, are in the way, and for
    datasets of version 0.1 that may be wrong.
    """
    report = read_report(prefix)
    if report is None:
        return None
    identities = [settings.identity(i) for i in inputs]
    if is_of_first_format(report, identities):
        check_first_format(prefix, report, tokenizer_model)
    elif report["inputs"] != identities:
        raise DataError(
            f"{prefix}.json is about datasets made from other inputs, with other settings, or by another version: "
            f"remove it and them, or choose another --output-prefix"
        )
    missing = missing_file(prefix, report)
    if missing is None:
        check_first_ends(prefix, report, settings.eod)
        if parts_directory(prefix).exists():  # killed while it removed them
            with exclusive(prefix):
                remove_parts(prefix)
        return report
    print(f"{missing} is missing: the datasets of {prefix}.json are made again", flush=True)
    with exclusive(prefix):
        claim(prefix, report["data_sets"], are_ours=True)
    return None


def _publish(dataset: str, parts: list[Part], output: str) -> dict[str, Any]:
    """One dataset from its parts; its index appears last."""
    journals = [part.journal for part in parts]
    identity = journals[0].identity
    report = {"tokenizer": identity["tokenizer"], "eod": identity["eod"], **_counts(journals, output)}
    data = Path(f"{dataset}.bin.tmp")
    index = Path(f"{dataset}.idx.tmp")
    concatenate([part.paths(output)[0] for part in parts], data, may_link=True)
    lengths = np.concatenate([np.fromfile(part.paths(output)[1], dtype="<i4") for part in parts])
    write_index(index, parts[0].dtype, blocks_of_documents(lengths))
    sets = Path(f"{sets_path(dataset)}.tmp")
    joined_sets([part.document_sets(output) for part in parts]).write(sets)
    write_json(Path(f"{dataset}.json"), report)
    sets.replace(sets_path(dataset))
    data.replace(f"{dataset}.bin")
    index.replace(f"{dataset}.idx")
    return report


def _counts(journals: list[Journal], output: str) -> dict[str, Any]:
    total = Tally()
    sets: dict[str, Tally] = {}
    for journal in journals:
        for name, count in journal.counts.get(output, {}).items():
            sets.setdefault(name, Tally()).add(count)
            total.add(count)
    return {**asdict(total), "pile_sets": {name: asdict(count) for name, count in sorted(sets.items())}}
