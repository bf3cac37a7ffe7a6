"""Tokenize text into Megatron-LM's indexed datasets: PREFIX_KEY_document.bin and .idx, and a report PREFIX.json.

If it is killed at any point, the same command resumes and produces identical files. Under mpiexec or srun, one rank
distributes the inputs to the others.

Examples:
    megatron-tf preprocess-data --input 'pile/*.jsonl.zst' --output-prefix data/pile \\
        --tokenizer-type HFTokenizer --tokenizer-model tokenizer.json --append-eod
    mpiexec -n 5 megatron-tf preprocess-data --input ...
    zstdcat pile.tar.zst | tar -xO | megatron-tf preprocess-data --input - ...
    megatron-tf preprocess-data --hf-dataset HuggingFaceFW/fineweb --hf-config sample-10BT --hf-split train ...
    megatron-tf preprocess-data --sft --input chat.jsonl --output-prefix data/chat \\
        --tokenizer-type HFTokenizer --tokenizer-model tokenizer.json --append-eod
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_tf.commands.arguments import file_path, file_prefix, make_parser, parse
from megatron_tf.commands.runner import command
from megatron_tf.data.chat_files import CHATML, read_chat_template
from megatron_tf.data.chat_template import ChatTemplate
from megatron_tf.data.documents import Input, Source
from megatron_tf.data.indexed_dataset import DataError, token_dtype
from megatron_tf.data.preprocess import (
    UNKNOWN_SET,
    ReportProgress,
    Settings,
    assemble,
    finished_report,
    tokenize_source,
)
from megatron_tf.data.published import claim, exclusive
from megatron_tf.data.sources import inputs_of, sources_of
from megatron_tf.data.standard_input import StandardInput
from megatron_tf.data.tokenizer import TYPES, build_tokenizer
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by
from megatron_tf.parallel.launch import number_of

MAX_KEY_BYTES = 100
build_once = cache(build_tokenizer)  # in a process, for all its inputs
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")  # set by mpiexec and srun


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line; names follow Megatron-LM's tool."""

    input: list[str] | None
    hf_dataset: str | None
    hf_config: str | None
    hf_split: str | None
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: Path | None
    eod_token: str | None
    json_keys: list[str] | None
    sft: bool
    chat_template: str | None
    append_eod: bool
    split_by_meta: str | None
    workers: int
    log_interval: int
    max_bad_lines: float

    @property
    def keys(self) -> list[str]:
        """The keys that hold text or conversations."""
        return self.json_keys or ["messages" if self.sft else "text"]


@command(interrupted="interrupted: run the same command again to resume")
def main(arguments: list[str] | None = None) -> int:
    """Make the datasets. Work finished before an error is kept."""
    options = parse_arguments(arguments)
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)  # read by the engines for byte-level BPE when they start
    try:
        with mpi_ranks() as ranks:
            if ranks is not None or is_alone():
                preprocess(options, ranks)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # the disk, or a quota, is full
            raise DataError(f"{error}: make room and run the same command again to resume") from error
        raise
    return 0


def parse_arguments(arguments: list[str] | None) -> Options:
    """Parse the command line, whose names follow Megatron-LM's tool."""
    parser = make_parser("preprocess-data", __doc__)
    add = parser.add_argument
    _add_inputs(parser)
    add(
        "--output-prefix", type=file_prefix, required=True, help="path prefix of the datasets: PREFIX_text_document.bin"
    )
    add(
        "--json-keys",
        nargs="+",
        help="keys of the JSON objects, or columns, that hold text; each gets a dataset; meta.text is text under meta, "
        "unless there is a key of that whole name (default: text, or messages with --sft)",
    )
    add("--append-eod", action="store_true", help="append the end-of-document token to each document")
    add(
        "--split-by-meta",
        metavar="KEY",
        help="make a separate dataset for each value of meta.KEY, such as pile_set_name",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="number of tokenizer threads")
    add("--log-interval", type=int, default=10000, help="documents between progress lines in a log")
    add("--max-bad-lines", type=float, default=0.001, help="fail if more than this fraction of the lines is invalid")
    _add_tokenizer_options(parser)
    _add_chat_options(parser)
    options = parse(parser, Options, arguments)
    check_options(parser, options)
    return options


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("inputs", "either --input or --hf-dataset").add_argument
    add(
        "--input",
        nargs="+",
        help=".jsonl files, also compressed (.gz, .zst, .xz, .bz2), .parquet or .arrow files, patterns such as '*.zst' "
        "of them, or - for JSON lines on standard input",
    )
    add("--hf-dataset", metavar="NAME_OR_PATH", help="dataset on the Hugging Face Hub, or a local directory with one")
    add("--hf-config", metavar="NAME", help="configuration of that dataset, if it has several")
    add("--hf-split", metavar="SPLIT", help="its split, such as train")


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tokenizer").add_argument
    add("--tokenizer-type", required=True, help=f"one of {', '.join(TYPES)}")
    add("--tokenizer-model", type=file_path, help="the tokenizer's file; a vocab.json needs merges.txt next to it")
    add("--eod-token", metavar="TOKEN", help="end-of-document token (default: the one named in the tokenizer's files)")


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("chat data").add_argument
    add(
        "--sft",
        action="store_true",
        help="the keys hold conversations, lists of {role, content} or {from, value}: write them in the tokenizer's "
        "chat template, with a loss mask (PREFIX_messages_document_loss_mask) that selects the assistant's answers",
    )
    add(
        "--chat-template",
        metavar="FILE",
        help=f"Jinja template to use instead of the tokenizer's, or {CHATML} for the built-in one (with --sft)",
    )


def check_options(parser: argparse.ArgumentParser, options: Options) -> None:
    """Exit with code 2 for invalid values."""
    if (options.input is None) == (options.hf_dataset is None):
        parser.error("give either --input or --hf-dataset")
    if (options.hf_dataset is None) != (options.hf_split is None):
        parser.error("--hf-dataset and --hf-split go together")
    if options.hf_config is not None and options.hf_dataset is None:
        parser.error("--hf-config needs --hf-dataset")
    if options.chat_template is not None and not options.sft:
        parser.error("--chat-template needs --sft")
    for name in ("workers", "log_interval"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    if not 0 <= options.max_bad_lines <= 1:  # nan too
        parser.error(f"--max-bad-lines is a fraction from 0 to 1, not {options.max_bad_lines}")
    for key in options.keys:
        if options.keys.count(key) > 1:
            parser.error(f"--json-keys names {key!r} twice")
        if not key or "/" in key or "\0" in key or len(os.fsencode(key)) > MAX_KEY_BYTES:
            parser.error(
                f"--json-keys {key!r}: the name of a file is made of it, so that it can't be empty, long or have a /"
            )


def preprocess(options: Options, ranks: Any | None) -> None:
    """Tokenize every input and put the datasets together, on the ranks of an executor or in this process."""
    inputs, prefix = inputs_from(options), options.output_prefix
    if ranks is not None and any(isinstance(each, StandardInput) for each in inputs):
        raise DataError("--input - has to be read by one process: start it without mpiexec, or write the text to files")
    tokenizer = build_tokenizer(
        options.tokenizer_type, options.tokenizer_model, threads=options.workers, eod_token=options.eod_token
    )
    eod = tokenizer.eod if options.append_eod else None
    settings = Settings(
        tokenizer=tokenizer.identity,
        keys=tuple(options.keys),
        chat=chat_template_of(options),
        append_eod=options.append_eod,
        split_by_meta=options.split_by_meta,
        eod=eod,
    )
    report = finished_report(inputs, prefix, settings, tokenizer_model=options.tokenizer_model)
    if report is not None:
        print(f"{prefix}.json: these datasets are complete already")
    else:
        sources = sources_of(inputs, settings.fields)
        with exclusive(prefix):
            if options.split_by_meta is None:  # otherwise the names are only known after reading everything
                claim(prefix, [f"{prefix}_{key}_document" for key in options.keys])
            work = list(chain.from_iterable(sources))
            if ranks is None:
                with progress_of(work, options.log_interval) as progress:
                    for number, source in enumerate(work):
                        tokenize_source(
                            source, number, prefix=prefix, settings=settings, tokenizer=tokenizer, progress=progress
                        )
            else:
                tokenize_on_ranks(ranks, work, options=options, settings=settings)
            report = assemble(
                inputs,
                sources,
                prefix=prefix,
                settings=settings,
                dtype=token_dtype(tokenizer.vocab_size),
                max_bad_lines=options.max_bad_lines,
            )
    tell(report, options.split_by_meta)


def chat_template_of(options: Options) -> ChatTemplate | None:
    """Return the template of conversations; None for text. Raises DataError if there is none."""
    if not options.sft:
        return None
    if options.tokenizer_type != "HFTokenizer" or options.tokenizer_model is None:
        raise DataError("--sft needs --tokenizer-type HFTokenizer with its tokenizer.json")
    return read_chat_template(options.tokenizer_model, options.chat_template)


def inputs_from(options: Options) -> list[Input]:
    """Return the inputs that the command line names. Raises DataError for those that can't be found."""
    if options.hf_dataset is None:
        return inputs_of(options.input or [])
    with needed_by("--hf-dataset"):
        from megatron_tf.data.hub_datasets import HubDataset
    return [HubDataset(options.hf_dataset, options.hf_config, options.hf_split or "")]


def tell(report: dict[str, Any], split_by_meta: str | None) -> None:
    """Print what the datasets contain, and which lines were skipped."""
    for data_set, counts in report["data_sets"].items():
        targets = f", {counts['targets']:,} of them in answers" if "targets" in counts else ""
        print(f"{data_set}: {counts['documents']:,} documents, {counts['tokens']:,} tokens{targets}")
    for kind, bad in report["bad_lines"].items():
        lost = f"{bad['bytes']:,} bytes in {bad['shards']:,} shards"
        print(f"skipped {bad['count']:,} bad lines ({lost}): {kind}, the first at {bad['first']}")
    without = report.get("without_set", 0)
    if split_by_meta is not None and without:
        print(
            f"warning: {without:,} of {report['documents']:,} documents have no meta.{split_by_meta}: they are in the "
            f"dataset {UNKNOWN_SET}; is --split-by-meta right?",
            file=sys.stderr,
        )


@contextmanager
def progress_of(sources: Sequence[Source], log_interval: int) -> Iterator[ReportProgress]:
    """Return a progress callback: a bar on a terminal, lines in a log. Both count bytes of the input files on disk."""
    total = sum(source.size for source in sources)
    is_known = all(source.size for source in sources)
    if sys.stderr.isatty():
        from tqdm import tqdm  # takes a while to import

        with tqdm(total=total if is_known else None, unit="B", unit_scale=True) as bar:
            yield lambda more_bytes, _: _advance(bar, more_bytes)
        return
    started = time.perf_counter()
    done = 0
    documents = 0

    def progress(more_bytes: int, more_documents: int) -> None:
        nonlocal done, documents
        done, before = done + more_bytes, documents // log_interval
        documents += more_documents
        if documents // log_interval > before:
            seconds = time.perf_counter() - started
            share = f"{done / total:6.1%} of the input, " if is_known else ""
            print(f"{documents:>12,} documents, {share}{seconds:,.0f} s", flush=True)

    yield progress


def _advance(bar: Any, more_bytes: int) -> None:
    bar.update(more_bytes)


def is_alone() -> bool:
    """Return whether this process was started without mpiexec or srun, or as their only rank."""
    return all(number_of(name) == 1 for name in MPI_SIZES)


@contextmanager
def mpi_ranks() -> Iterator[Any | None]:
    """Yield an executor over the other ranks on rank 0. On those, serve it and yield None, as for a single process."""
    if is_alone():
        yield None
        return
    with needed_by("more than one rank"):
        from mpi4py.futures import MPICommExecutor
    with MPICommExecutor(root=0) as ranks:
        yield ranks


def tokenize_on_ranks(ranks: Any, sources: Sequence[Source], *, options: Options, settings: Settings) -> None:
    """Distribute the sources, largest first. Raises DataError naming all that failed, after the others are done."""
    tokenize = partial(tokenize_alone, options=options, settings=settings)
    order = sorted(range(len(sources)), key=lambda number: -sources[number].size)
    jobs = {number: ranks.submit(tokenize, sources[number], number) for number in order}
    failures = []
    for done, (number, job) in enumerate(jobs.items(), 1):
        name, error = sources[number].name, job.exception()
        if error is None:
            print(f"{name}: {job.result():,} documents ({done} of {len(jobs)} inputs)", flush=True)
        else:
            message = error if isinstance(error, (UserError, OSError)) else repr(error)
            failures.append(f"  {name}: {message}")
    if failures:
        raise DataError("\n".join([f"{len(failures)} of {len(jobs)} inputs failed; the others are kept:", *failures]))


def tokenize_alone(source: Source, number: int, *, options: Options, settings: Settings) -> int:
    """Tokenize one source on the rank it was assigned to; return its number of documents."""
    documents = 0

    def count(_: int, more_documents: int) -> None:
        nonlocal documents
        documents += more_documents

    tokenizer = build_once(
        options.tokenizer_type, options.tokenizer_model, threads=options.workers, eod_token=options.eod_token
    )
    prefix = options.output_prefix
    tokenize_source(source, number, prefix=prefix, settings=settings, tokenizer=tokenizer, progress=count)
    return documents
