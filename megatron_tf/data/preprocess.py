"""Preprocesses text into datasets: each source becomes a part, parts become PREFIX_KEY_document.bin and .idx."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

import megatron_tf
from megatron_tf.ahead import computed_ahead, mapped_ahead
from megatron_tf.data.chat_ids import encode_conversations
from megatron_tf.data.chat_template import ChatTemplate
from megatron_tf.data.document_sets import joined_sets, sets_path
from megatron_tf.data.documents import (
    BadLines,
    DocumentBatch,
    Fields,
    Input,
    Position,
    Source,
    check_any,
    text_of,
    utf8_size,
)
from megatron_tf.data.first_format import check_first_ends, check_first_format, is_of_first_format
from megatron_tf.data.indexed_dataset import DataError, blocks_of_documents, token_dtype, write_index
from megatron_tf.data.loss_mask import write_loss_mask
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
from megatron_tf.data.standard_input import StandardInput
from megatron_tf.data.tokenizer import Encoded, Tokenizer
from megatron_tf.files import concatenate, write_json

T = TypeVar("T")
ReportProgress = Callable[[int, int], None]
"""Called with (bytes of the input, documents) processed since the last call."""

UNKNOWN_SET = "unknown"  # set of documents that don't name one
COMMIT_BYTES = 256 << 20  # bytes of lines between commits: the work that a kill can cost
FORMAT_VERSION = 2  # of the format of parts: changes with the bytes written for the same input


@dataclass(frozen=True)
class Settings:
    """Everything besides the inputs that determines the contents of the datasets."""

    tokenizer: dict[str, Any]
    """Identity of the tokenizer."""
    keys: tuple[str, ...]
    append_eod: bool
    split_by_meta: str | None
    """Key under `meta`; each of its values gets its own datasets."""
    eod: int | None = None
    """The id appended to each document."""
    chat: ChatTemplate | None = None
    """Template of conversations; None for text."""

    @property
    def fields(self) -> Fields:
        """What is read of each row."""
        fields = Fields(self.keys, chat=self.chat)
        return fields if self.split_by_meta is None else replace(fields, set_key=self.split_by_meta)

    def identity(self, of: Input | Source) -> dict[str, Any]:
        """Return everything that determines the bytes written for an input or a source, as JSON values."""
        return {"format": FORMAT_VERSION, **of.identity(), **self.to_json()}

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that identify the settings."""
        # through JSON, which turns tuples into lists: it is compared with a value read from a journal
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.chat is None:  # datasets of text are identified as they were before there was chat
            del values["chat"]
        return values


class Tokenized(NamedTuple):
    """The texts, or conversations, of a batch."""

    ids: Encoded
    loss_mask: Encoded | None
    """1 for ids that are targets; None for texts."""


def tokenize_source(
    source: Source, number: int, *, prefix: str, settings: Settings, tokenizer: Tokenizer, progress: ReportProgress
) -> None:
    """Tokenize one source into part `number`, or resume that. Raises DataError or OSError; committed work is kept."""
    dtype = token_dtype(tokenizer.vocab_size)
    with _part(prefix, number, source, settings=settings, dtype=dtype) as part:
        journal = part.journal
        if journal.is_complete:
            if isinstance(source, StandardInput):
                source.check(journal.end)
            progress(source.size, journal.num_documents)
            return
        done = 0
        uncommitted = 0

        def finish(batch: DocumentBatch) -> tuple[DocumentBatch, dict[str, Tokenized]]:
            return batch, _tokenized(batch, settings, tokenizer)

        # a thread reads, two encode, and this one writes: the tokenizer's engine, which is the slowest, waits for none
        # of them, and not for texts that a slower library has to encode
        with (
            computed_ahead(source.batches(settings.fields, journal.end)) as batches,
            mapped_ahead(finish, batches, threads=2) as finished,
        ):
            for batch, tokenized in finished:
                _add(part, batch, tokenized, settings=settings)
                progress(batch.end_byte - done, len(batch.documents))
                done = batch.end_byte
                uncommitted += batch.line_bytes
                if uncommitted >= COMMIT_BYTES:
                    part.commit()
                    uncommitted = 0
        if source.is_whole:
            check_any(source.name, journal.num_documents, journal.bad)
        part.commit(is_complete=True)


def _part(prefix: str, number: int, source: Source, *, settings: Settings, dtype: np.dtype) -> Part:
    stem = parts_directory(prefix) / f"{number:05d}"
    return Part(stem, settings.identity(source), dtype, has_mask=settings.chat is not None)


def _add(part: Part, batch: DocumentBatch, tokenized: Mapping[str, Tokenized], *, settings: Settings) -> None:
    set_key = settings.fields.set_key
    sets = [_set_name(document, set_key) for document in batch.documents]
    end = settings.eod if settings.chat is None else None  # conversations have theirs
    for key, (texts, mask) in tokenized.items():
        finished = texts.finished(part.dtype, end)
        sizes = [utf8_size(text_of(document[key])) for document in batch.documents]
        for output, which in _outputs(key, sets, settings).items():
            # in the usual case of one set per batch, nothing is copied
            is_all = len(which) == len(sizes)
            chosen = finished if is_all else finished.chosen(which)
            chosen_mask = mask if mask is None or is_all else mask.chosen(which)
            lengths = chosen.lengths.tolist()
            documents = [(sets[i] or UNKNOWN_SET, length, sizes[i]) for i, length in zip(which, lengths, strict=True)]
            part.append(output, chosen.ids, documents, mask=None if chosen_mask is None else chosen_mask.ids)
    part.journal.lines = batch.end_line
    part.journal.digest = batch.digest
    part.journal.without_set += sets.count(None)
    part.journal.bad.merge(batch.bad, set(part.journal.bad.counts))


def _tokenized(batch: DocumentBatch, settings: Settings, tokenizer: Tokenizer) -> dict[str, Tokenized]:
    """Encode the texts or conversations of a batch, by their keys; empty for a batch without documents."""
    tokenized = {}
    for key in settings.keys if batch.documents else ():
        values = [document[key] for document in batch.documents]
        if settings.chat is None:
            tokenized[key] = Tokenized(tokenizer.encode_batch(values), None)
        else:
            tokenized[key] = Tokenized(*encode_conversations(values, tokenizer, settings.eod))
        highest = int(tokenized[key].ids.ids.max(initial=0))
        if highest >= tokenizer.vocab_size:  # it would wrap around in the type of the file
            raise DataError(
                f"the tokenizer gave id {highest:,}, its vocabulary has {tokenizer.vocab_size:,}: report this"
            )
    return tokenized


def _outputs(key: str, sets: list[str | None], settings: Settings) -> dict[str, list[int]]:
    """Map each output to the indices of the batch's documents that belong to it."""
    if settings.split_by_meta is None:
        return {output_of(key, None): list(range(len(sets)))}
    outputs: dict[str, list[int]] = {}
    for i, name in enumerate(sets):
        outputs.setdefault(output_of(key, name or UNKNOWN_SET), []).append(i)
    return outputs


def _set_name(document: dict[str, Any], key: str) -> str | None:
    meta = document.get("meta")
    return set_name(meta[key]) if isinstance(meta, dict) and key in meta else None


def assemble(
    inputs: Sequence[Input],
    sources: Sequence[Sequence[Source]],
    *,
    prefix: str,
    settings: Settings,
    dtype: np.dtype,
    max_bad_lines: float,
) -> dict[str, Any]:
    """Concatenate the parts of all sources in order, and return the report that is written to PREFIX.json.

    Raises DataError if a part is incomplete, too many lines are bad, or an input has no document.
    """
    parts = [
        _part(prefix, number, source, settings=settings, dtype=dtype)
        for number, source in enumerate(chain.from_iterable(sources))
    ]
    remaining = iter(parts)
    groups = [list(islice(remaining, len(each))) for each in sources]
    for source, part in zip(chain.from_iterable(sources), parts, strict=True):
        if not part.journal.is_complete:
            raise DataError(f"{source.name} has not been tokenized completely: run the same command again to resume")
    bad = BadLines()
    for each, group in zip(inputs, groups, strict=True):
        _merge_bad_lines(bad, each, group)
    bad.check(max_bad_lines)
    outputs = sorted(set().union(*(part.journal.counts for part in parts)))
    names = dataset_names(prefix, outputs, is_split=settings.split_by_meta is not None)
    claim(prefix, names.values())
    report: dict[str, Any] = {
        "version": megatron_tf.__version__,
        "settings": settings.to_json(),
        "inputs": [
            {**settings.identity(each), **_end_of_stream(each, group)}
            for each, group in zip(inputs, groups, strict=True)
        ],
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
    write_json(Path(f"{prefix}.json"), report)  # also syncs the directory, so parts can go
    remove_parts(prefix)
    return report


def _merge_bad_lines(bad: BadLines, of: Input, group: Sequence[Part]) -> None:
    """Add the bad lines of the parts of one input, which count as one file. Raises DataError if none has a document."""
    bad_here = BadLines()
    for part in group:
        bad_here.merge(part.journal.bad, set(bad_here.counts))
    check_any(of.name, sum(part.journal.num_documents for part in group), bad_here)
    bad.merge(bad_here)


def _end_of_stream(of: Input, group: Sequence[Part]) -> dict[str, Any]:
    """Return what a report adds to the identity of an input whose contents have no name, size and date."""
    return {"end": list(group[0].journal.end)} if isinstance(of, StandardInput) else {}


def finished_report(
    inputs: Sequence[Input], prefix: str, settings: Settings, *, tokenizer_model: Path | None = None
) -> dict[str, Any] | None:
    """Return the report if an earlier command made exactly these datasets and all still exist; remove leftover parts.

    Returns None if there is no report or a dataset is missing. Raises DataError if other datasets or other files are in
    the way, for datasets of version 0.1 that may be wrong, and if standard input is not the one that they were made of.
    """
    report = read_report(prefix)
    if report is None:
        return None
    identities = [settings.identity(each) for each in inputs]
    ends = [recorded.get("end") for recorded in report["inputs"]]
    recorded = [{key: value for key, value in each.items() if key != "end"} for each in report["inputs"]]
    if is_of_first_format(report, identities):
        check_first_format(prefix, report, tokenizer_model)
    elif recorded != identities:
        raise DataError(
            f"{prefix}.json describes datasets made from other inputs, with other settings, or by another version: "
            f"remove both, or choose another --output-prefix"
        )
    missing = missing_file(prefix, report)
    if missing is None:
        check_first_ends(prefix, report, settings.eod)
        for each, end in zip(inputs, ends, strict=True):
            if isinstance(each, StandardInput):
                each.check(Position(*end))
        if parts_directory(prefix).exists():  # an earlier command was killed while removing them
            with exclusive(prefix):
                remove_parts(prefix)
        return report
    print(f"{missing} is missing: making the datasets of {prefix}.json again", flush=True)
    with exclusive(prefix):
        claim(prefix, report["data_sets"], are_ours=True)
    return None


def _publish(dataset: str, parts: list[Part], output: str) -> dict[str, Any]:
    """Write one dataset from its parts; the index appears last."""
    journals = [part.journal for part in parts]
    identity = journals[0].identity
    report: dict[str, Any] = {"tokenizer": identity["tokenizer"], "eod": identity["eod"], **_counts(journals, output)}
    data = Path(f"{dataset}.bin.tmp")
    index = Path(f"{dataset}.idx.tmp")
    concatenate([part.paths(output)[0] for part in parts], data, may_link=True)
    lengths = np.concatenate([np.fromfile(part.paths(output)[1], dtype="<i4") for part in parts])
    write_index(index, parts[0].dtype, blocks_of_documents(lengths))
    if parts[0].has_mask:
        report["targets"] = write_loss_mask(dataset, [part.paths(output)[3] for part in parts], lengths)
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
