"""Turn Pile shards into Megatron's indexed datasets: PREFIX_KEY_document.bin and .idx, and a report in PREFIX.json.

On many machines, one of the ranks hands out the inputs: mpiexec -n 5 megatron-tf preprocess-data ... (or srun).
Killed at any point, the same command resumes where it was and gives the same bytes.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_tf.commands.arguments import file_path, file_prefix, make_parser, parse
from megatron_tf.commands.runner import command
from megatron_tf.data.indexed_dataset import DataError, token_dtype
from megatron_tf.data.inputs import find_inputs
from megatron_tf.data.preprocess import (
    UNKNOWN_SET,
    ReportProgress,
    Settings,
    assemble,
    finished_report,
    tokenize_input,
)
from megatron_tf.data.published import claim, exclusive
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

    input: list[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: Path | None
    eod_token: str | None
    json_keys: list[str]
    append_eod: bool
    split_by_meta: str | None
    workers: int
    log_interval: int
    max_bad_lines: float


@command(interrupted="interrupted: run the same command again to resume")
def main(arguments: list[str] | None = None) -> int:
    """Make the datasets. What is finished before an error is kept."""
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
    """The command line; names follow Megatron-LM's tool."""
    parser = make_parser("preprocess-data", __doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=".jsonl, .jsonl.gz or .jsonl.zst files, or patterns such as '*.zst'")
    add("--output-prefix", type=file_prefix, required=True, help="where the datasets go: PREFIX_text_document.bin")
    add("--tokenizer-type", required=True, help=", ".join(TYPES))
    add("--tokenizer-model", type=file_path, help="the tokenizer's file; of a vocab.json, merges.txt is next to it")
    add(
        "--eod-token", metavar="TOKEN", help="the token that ends a document (default: what the tokenizer's files name)"
    )
    add("--json-keys", nargs="+", default=["text"], help="texts to take from each line")
    add("--append-eod", action="store_true", help="end each document with the end-of-document id")
    add("--split-by-meta", metavar="KEY", help="a dataset for each value of meta.KEY, such as pile_set_name")
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads that tokenize")
    add("--log-interval", type=int, default=10000, help="documents between lines of a log")
    add("--max-bad-lines", type=float, default=0.001, help="fraction of lines that may be bad")
    options = parse(parser, Options, arguments)
    check_options(parser, options)
    return options


def check_options(parser: argparse.ArgumentParser, options: Options) -> None:
    """End with exit code 2 for values that can't be right."""
    for name in ("workers", "log_interval"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    if not 0 <= options.max_bad_lines <= 1:  # nan too
        parser.error(f"--max-bad-lines is a fraction from 0 to 1, not {options.max_bad_lines}")
    for key in options.json_keys:
        if options.json_keys.count(key) > 1:
            parser.error(f"--json-keys names {key!r} twice")
        if not key or "/" in key or "\0" in key or len(os.fsencode(key)) > MAX_KEY_BYTES:
            parser.error(
                f"--json-keys {key!r}: the name of a file is made of it, so that it can't be empty, long or have a /"
            )


def preprocess(options: Options, ranks: Any | None) -> None:
    """Tokenize every input and put the datasets together, on the ranks of an executor or in this process."""
    inputs, prefix = find_inputs(options.input), options.output_prefix
    tokenizer = build_tokenizer(
        options.tokenizer_type, options.tokenizer_model, threads=options.workers, eod_token=options.eod_token
    )
    eod = tokenizer.eod if options.append_eod else None
    settings = Settings(
        tokenizer=tokenizer.identity,
        keys=tuple(options.json_keys),
        append_eod=options.append_eod,
        split_by_meta=options.split_by_meta,
        eod=eod,
    )
    report = finished_report(inputs, prefix, settings, tokenizer_model=options.tokenizer_model)
    if report is not None:
        print(f"{prefix}.json: these datasets are complete already")
    else:
        with exclusive(prefix):
            if options.split_by_meta is None:  # otherwise the names are known when all has been read
                claim(prefix, [f"{prefix}_{key}_document" for key in options.json_keys])
            if ranks is None:
                with progress_of(inputs, options.log_interval) as progress:
                    for number, path in enumerate(inputs):
                        tokenize_input(
                            path, number, prefix=prefix, settings=settings, tokenizer=tokenizer, progress=progress
                        )
            else:
                tokenize_on_ranks(ranks, inputs, options=options, settings=settings)
            dtype = token_dtype(tokenizer.vocab_size)
            report = assemble(inputs, prefix, settings, dtype=dtype, max_bad_lines=options.max_bad_lines)
    tell(report, options.split_by_meta)


def tell(report: dict[str, Any], split_by_meta: str | None) -> None:
    """Print what is in the datasets, and what is not."""
    for data_set, counts in report["data_sets"].items():
        print(f"{data_set}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
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
def progress_of(inputs: list[Path], log_interval: int) -> Iterator[ReportProgress]:
    """A bar on a terminal, lines in a log; both count bytes of the inputs as they are on disk."""
    total = sum(path.stat().st_size for path in inputs)
    documents = 0
    started = time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        done = 0

        def progress(more_bytes: int, more_documents: int) -> None:
            nonlocal done, documents
            done, before = done + more_bytes, documents // log_interval
            documents += more_documents
            bar.update(more_bytes)
            if bar.disable and documents // log_interval > before:
                seconds = time.perf_counter() - started
                print(f"{documents:>12,} documents, {done / total:6.1%} of the input, {seconds:,.0f} s", flush=True)

        yield progress


def is_alone() -> bool:
    """Whether this process was started without mpiexec or srun, or by these as the only one."""
    return all(number_of(name) == 1 for name in MPI_SIZES)


@contextmanager
def mpi_ranks() -> Iterator[Any | None]:
    """On rank 0 an executor over the other ranks, which serve it here; None for them, and for a process on its own."""
    if is_alone():
        yield None
        return
    with needed_by("more than one rank"):
        from mpi4py.futures import MPICommExecutor
    with MPICommExecutor(root=0) as ranks:
        yield ranks


def tokenize_on_ranks(ranks: Any, inputs: list[Path], *, options: Options, settings: Settings) -> None:
    """Hand out the inputs, the largest first. Raises DataError that names each one that failed, after all others."""
    order = sorted(range(len(inputs)), key=lambda number: -inputs[number].stat().st_size)
    jobs = []
    for number in order:
        job = ranks.submit(tokenize_alone, inputs[number], number, options=options, settings=settings)
        jobs.append((number, job))
    failures = []
    for done, (number, job) in enumerate(jobs, 1):
        error = job.exception()
        if error is None:
            print(f"{inputs[number]}: {job.result():,} documents ({done} of {len(jobs)} inputs)", flush=True)
        else:
            message = error if isinstance(error, (UserError, OSError)) else repr(error)
            failures.append(f"  {inputs[number]}: {message}")
    if failures:
        raise DataError("\n".join([f"{len(failures)} of {len(jobs)} inputs failed; the others are kept:", *failures]))


def tokenize_alone(path: Path, number: int, *, options: Options, settings: Settings) -> int:
    """Documents of one input, tokenized on the rank that got it."""
    documents = 0

    def count(_: int, more_documents: int) -> None:
        nonlocal documents
        documents += more_documents

    tokenizer = build_once(
        options.tokenizer_type, options.tokenizer_model, threads=options.workers, eod_token=options.eod_token
    )
    prefix = options.output_prefix
    tokenize_input(path, number, prefix=prefix, settings=settings, tokenizer=tokenizer, progress=count)
    return documents
