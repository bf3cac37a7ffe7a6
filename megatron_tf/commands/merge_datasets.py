"""Concatenate datasets into one; documents keep their order within each and follow the order of --input.

Example:
    megatron-tf merge-datasets --input data/a_text_document data/b_text_document --output-prefix data/all_text_document
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tf.commands.arguments import file_prefix, make_parser, parse
from megatron_tf.commands.runner import command
from megatron_tf.data.document_sets import DocumentSets, joined_sets, read_document_sets, sets_path
from megatron_tf.data.indexed_dataset import INDEX_BLOCK, DataError, IndexedDataset, write_index
from megatron_tf.data.loss_mask import has_loss_mask
from megatron_tf.data.output_names import mask_prefix
from megatron_tf.data.published import report_of
from megatron_tf.files import concatenate, sync_directory, write_json


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    input: list[str]
    output_prefix: str


@command()
def main(arguments: list[str] | None = None) -> int:
    """Merge the datasets. After an error, nothing appears under the new name."""
    parser = make_parser("merge-datasets", __doc__)
    parser.add_argument(
        "--input", nargs="+", type=file_prefix, required=True, metavar="PREFIX", help="prefixes of .bin/.idx pairs"
    )
    parser.add_argument("--output-prefix", type=file_prefix, required=True, help="prefix of the new dataset")
    options = parse(parser, Options, arguments)
    merge(options.input, options.output_prefix)
    return 0


def merge(prefixes: list[str], output: str) -> None:
    """Write the new dataset, which appears under its name once it is complete."""
    masked = [has_loss_mask(prefix) for prefix in prefixes]
    if any(masked) and not all(masked):
        raise DataError(
            f"{prefixes[masked.index(True)]} has a loss mask, {prefixes[masked.index(False)]} has none: name both in "
            f"data.data_path instead of merging them"
        )
    outputs = [output, *([mask_prefix(output)] if all(masked) else [])]
    for name in outputs:
        check_free(name)
    merge_files(prefixes, output, merged_report(prefixes))
    if all(masked):  # after the ids, which can't be trained on without it
        merge_files([mask_prefix(prefix) for prefix in prefixes], mask_prefix(output), {})
    merged = IndexedDataset(output)
    print(f"{output}: {len(merged):,} documents, {merged.num_tokens:,} tokens")


def check_free(output: str) -> None:
    """Raise DataError if a file of the new dataset exists."""
    for path in (*(Path(f"{output}.{kind}") for kind in ("idx", "bin", "json")), sets_path(output)):
        if os.path.lexists(path):
            raise DataError(f"{path} exists: remove that dataset, or choose another --output-prefix")


def merge_files(prefixes: list[str], output: str, report: dict[str, Any]) -> None:
    """Write the files of a dataset. After an error, nothing appears under its name."""
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    sets = merged_sets(datasets)
    dtypes = {dataset.dtype for dataset in datasets}
    if len(dtypes) > 1:
        raise DataError(f"the datasets hold ids of different types: {', '.join(sorted(map(str, dtypes)))}")
    data, index, report_path = Path(f"{output}.bin.tmp"), Path(f"{output}.idx.tmp"), Path(f"{output}.json")
    data.parent.mkdir(parents=True, exist_ok=True)
    try:
        concatenate([Path(f"{prefix}.bin") for prefix in prefixes], data)
        write_index(index, datasets[0].dtype, lambda: blocks(datasets))
        if report:
            write_json(report_path, report)
        if sets is not None:
            sets.write(sets_path(output))
    except BaseException:
        for path in (data, index, report_path, sets_path(output)):
            path.unlink(missing_ok=True)
        raise
    data.replace(f"{output}.bin")
    index.replace(f"{output}.idx")
    sync_directory(index.parent)


def merged_sets(datasets: list[IndexedDataset]) -> DocumentSets | None:
    """Return the sets of all documents; None unless they are known for every dataset."""
    known = [read_document_sets(dataset.prefix, len(dataset)) for dataset in datasets]
    parts = [part for part in known if part is not None]
    return joined_sets(parts) if len(parts) == len(known) else None


def blocks(datasets: list[IndexedDataset]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Yield the blocks of all inputs, as `megatron_tf.data.indexed_dataset.Blocks`."""
    for dataset in datasets:
        for start in range(0, len(dataset), INDEX_BLOCK):
            bounds = dataset.documents[start : start + INDEX_BLOCK + 1]
            yield dataset.lengths[int(bounds[0]) : int(bounds[-1])], np.diff(bounds)


def merged_report(prefixes: list[str]) -> dict[str, Any]:
    """Return the sum of the reports, empty if a dataset has none. Raises DataError if tokenizers differ."""
    paths = [Path(f"{prefix}.json") for prefix in prefixes]
    if not all(path.exists() for path in paths):
        print("no report is written: " + ", ".join(str(path) for path in paths if not path.exists()) + " missing")
        return {}
    reports = [report_of(prefix) or {} for prefix in prefixes]
    for path, report in zip(paths, reports, strict=True):
        if report["tokenizer"] != reports[0]["tokenizer"]:
            raise DataError(f"{path} and {paths[0]} name different tokenizers")
        if report.get("eod") != reports[0].get("eod"):
            raise DataError(f"{path} and {paths[0]} name different end-of-document ids")
    sets: dict[str, dict[str, int]] = {}
    for report in reports:
        for name, counts in report["pile_sets"].items():
            sets[name] = add(sets.get(name, {}), counts)
    total: dict[str, int] = {}
    for report in reports:
        total = add(
            total, {key: report[key] for key in ("documents", "tokens", "text_bytes", "targets") if key in report}
        )
    ends = {"eod": reports[0]["eod"]} if "eod" in reports[0] else {}
    return {"tokenizer": reports[0]["tokenizer"], **ends, **total, "pile_sets": sets}


def add(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Add up the counts of two reports."""
    return {key: one.get(key, 0) + value for key, value in other.items()}
