"""Turn Pile shards into Megatron's indexed datasets: PREFIX_KEY_document.bin and .idx, and a report in PREFIX.json.

On many machines, one of the ranks hands out the inputs: mpiexec -n 5 python tools/preprocess_data.py ... (or srun).
Killed at any point, the same command goes on where it was and gives the same bytes.
"""

import argparse
import errno
import glob
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_tf.data.indexed_dataset import DataError, token_dtype
from megatron_tf.data.preprocess import (
    Progress,
    Settings,
    assemble,
    exclusive,
    finished_report,
    tokenize_input,
)
from megatron_tf.data.tokenizer import TYPES, build_tokenizer
from megatron_tf.interrupt import run_command

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")  # set by mpiexec and srun


def main(arguments: list[str] | None = None) -> int:
    """0 when every data set is complete, 1 after an error."""
    args = parse_arguments(arguments)
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # read by the engines for byte-level BPE when they start
    try:
        with mpi_ranks() as ranks:
            if ranks is not None or is_alone():
                preprocess(args, ranks)
    except (ValueError, OSError) as error:
        hint = ": make room and run the same command again to go on" if is_disk_full(error) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; names follow Megatron-LM's tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=".jsonl, .jsonl.gz or .jsonl.zst files, or patterns such as '*.zst'")
    add("--output-prefix", required=True, help="where the data sets go: PREFIX_text_document.bin")
    add("--tokenizer-type", required=True, help=", ".join(TYPES))
    add("--tokenizer-model", type=Path, help="the tokenizer's file")
    add("--json-keys", nargs="+", default=["text"], help="texts to take from each line (default: text)")
    add("--append-eod", action="store_true", help="end each document with the end-of-document id")
    add("--split-by-meta", metavar="KEY", help="a data set for each value of meta.KEY, such as pile_set_name")
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads that tokenize (default: all cores)")
    add("--log-interval", type=int, default=10000, help="documents between lines of a log")
    add("--max-bad-lines", type=float, default=0.001, help="fraction of lines that may be bad (default: 0.001)")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error("--workers must be 1 or more")
    return args


def preprocess(args: argparse.Namespace, ranks: Any | None) -> None:
    """Tokenize every input and put the data sets together, on the ranks of an executor or in this process."""
    inputs, prefix = find_inputs(args.input), args.output_prefix
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.workers)
    settings = Settings(tokenizer.identity, tuple(args.json_keys), args.append_eod, args.split_by_meta)
    report = finished_report(inputs, prefix, settings)
    if report is not None:
        print(f"{prefix}.json: these data sets are complete already")
    else:
        with exclusive(prefix):
            if ranks is None:
                with progress_of(inputs, args.log_interval) as progress:
                    for number, path in enumerate(inputs):
                        tokenize_input(path, number, prefix, settings, tokenizer, progress)
            else:
                tokenize_on_ranks(ranks, inputs, args, settings)
            report = assemble(inputs, prefix, settings, token_dtype(tokenizer.vocab_size), args.max_bad_lines)
    for data_set, counts in report["data_sets"].items():
        print(f"{data_set}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    for kind, bad in report["bad_lines"].items():
        print(f"skipped {bad['count']:,} bad lines: {kind}, the first at {bad['first']}")


def find_inputs(patterns: list[str]) -> list[Path]:
    """Files of patterns, in the order given and sorted within a pattern. Raises DataError where one matches nothing."""
    inputs: list[Path] = []
    for pattern in patterns:
        paths = glob.glob(pattern) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207  Path.glob takes no absolute ones
        found = [path for path in map(Path, sorted(paths)) if path.is_file()]
        if not found:
            raise DataError(f"--input {pattern}: no such file")
        inputs += found
    if len(set(inputs)) < len(inputs):
        raise DataError("--input names a file twice")
    return inputs


@contextmanager
def progress_of(inputs: list[Path], log_interval: int) -> Iterator[Progress]:
    """A bar on a terminal, lines in a log; both count bytes of the inputs as they lie on disk."""
    total, documents, started = sum(path.stat().st_size for path in inputs), 0, time.perf_counter()
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
    return all(int(os.environ.get(name, "1")) == 1 for name in MPI_SIZES)


@contextmanager
def mpi_ranks() -> Iterator[Any | None]:
    """On rank 0 an executor over the other ranks, which serve it here; None for them, and for a process on its own."""
    if is_alone():
        yield None
        return
    try:
        from mpi4py.futures import MPICommExecutor
    except ImportError as error:
        raise DataError(f"more than one rank needs mpi4py: pip install mpi4py ({error})") from None
    with MPICommExecutor(root=0) as ranks:
        yield ranks


def tokenize_on_ranks(ranks: Any, inputs: list[Path], args: argparse.Namespace, settings: Settings) -> None:
    """Hand out the inputs, the largest first. Raises DataError that names each one that failed, after all others."""
    order = sorted(range(len(inputs)), key=lambda number: -inputs[number].stat().st_size)
    jobs = [(number, ranks.submit(tokenize_alone, inputs[number], number, args, settings)) for number in order]
    failures = []
    for done, (number, job) in enumerate(jobs, 1):
        error = job.exception()
        if error is None:
            print(f"{inputs[number]}: {job.result():,} documents ({done} of {len(jobs)} inputs)", flush=True)
        else:
            message = error if isinstance(error, (ValueError, OSError)) else repr(error)
            failures.append(f"  {inputs[number]}: {message}")
    if failures:
        raise DataError("\n".join([f"{len(failures)} of {len(jobs)} inputs failed; the others are kept:", *failures]))


def tokenize_alone(path: Path, number: int, args: argparse.Namespace, settings: Settings) -> int:
    """Documents of one input, tokenized on the rank that got it."""
    documents = 0

    def count(_: int, more_documents: int) -> None:
        nonlocal documents
        documents += more_documents

    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.workers)
    tokenize_input(path, number, args.output_prefix, settings, tokenizer, count)
    return documents


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk or a quota is what stopped us."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


if __name__ == "__main__":
    sys.exit(run_command(main))
